"""Is the model directory a whole SD3 pipeline, and how large is a checkpoint of it? Reads headers, loads nothing."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

MODELS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "F8_E4M3": 1, "F8_E5M2": 1}


def safetensors_parameters(file: Path) -> int:
    """Number of parameters in a safetensors file, from its header.

    Raises:
        ValueError: the file is cut short, or is no safetensors file.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        first = stream.read(8)
        if len(first) < 8 or (length := struct.unpack("<Q", first)[0]) > min(size, 100_000_000):
            raise ValueError("has no safetensors header")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise ValueError("has no safetensors header") from error
    header.pop("__metadata__", None)
    if 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0) != size:
        raise ValueError("is cut short")
    return sum((e["data_offsets"][1] - e["data_offsets"][0]) // DTYPE_BYTES.get(e["dtype"], 4) for e in header.values())


def weight_files(part: Path) -> tuple[list[Path], list[str]]:
    """Weight files of a part, and what is missing of them."""
    for index in sorted(part.glob("*.index*.json")):
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if missing := [f"{part.name}/{shard}" for shard in shards if not (part / shard).is_file()]:
            return [], missing
        return [part / shard for shard in shards], []
    files = sorted(part.glob("*.safetensors")) or sorted(part.glob("*.bin"))
    return files, [] if files else [f"{part.name}/*.safetensors"]


def check_model(name: str) -> list[str]:
    """Problems with --model_name, one sentence each; none for a hub name, which cannot be looked into."""
    root = Path(name)
    if not root.exists():
        if HUB_NAME.fullmatch(name) and not name.startswith("."):
            return []
        return [
            f"--model_name={name} is no directory and no hub name such as stabilityai/stable-diffusion-3.5-large; "
            "give the directory the model was downloaded to."
        ]
    if not root.is_dir():
        return [f"--model_name={name} is a file; give the directory with model_index.json in it."]
    missing = [] if (root / "model_index.json").is_file() else ["model_index.json"]
    broken = []
    for part in (*MODELS, "scheduler"):
        config = "scheduler_config.json" if part == "scheduler" else "config.json"
        if not (root / part / config).is_file():
            missing.append(f"{part}/{config}")
        elif part != "scheduler":
            files, absent = weight_files(root / part)
            missing += absent
            for file in files:
                try:
                    if file.suffix == ".safetensors":
                        safetensors_parameters(file)
                except ValueError as error:
                    broken.append(f"{part}/{file.name} {error}")
    for part in TOKENIZERS:
        if not (root / part / "tokenizer_config.json").is_file():
            missing.append(f"{part}/tokenizer_config.json")
    problems = []
    if missing:
        problems.append(f"--model_name={name} is incomplete: {', '.join(missing)} missing; download the model again.")
    if broken:
        problems.append(f"--model_name={name} is damaged: {'; '.join(broken)}; download these files again.")
    return problems


def checkpoint_bytes(name: str, lora: bool) -> int:
    """Estimate of the disk space that one checkpoint and the final model take; 0 for a hub name.

    A full checkpoint holds the transformer and AdamW's two moments in fp32 (12 bytes a parameter); the final pipeline
    is about as large as the model directory. A LoRA takes little; 1 GiB is on the safe side.
    """
    root = Path(name)
    if not root.is_dir():
        return 0
    if lora:
        return 2**30 if any(root.glob("transformer/*-of-*")) else 2**28
    files, _ = weight_files(root / "transformer")
    parameters = sum(
        safetensors_parameters(file) if file.suffix == ".safetensors" else file.stat().st_size // 4 for file in files
    )
    return 12 * parameters + sum(file.stat().st_size for file in root.rglob("*") if file.is_file())
