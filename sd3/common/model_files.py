"""The files of an SD3 pipeline directory: which there must be, what their headers say, and a hash of them.

Reads headers and samples; loads nothing. Standard library only.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

MODELS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
# Folders that a pipeline may have; a model's own index of them is the word of whoever made the model.
PARTS = (*MODELS, *TOKENIZERS, "scheduler", "image_encoder", "feature_extractor")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "F8_E4M3": 1, "F8_E5M2": 1}
# What the hash of a model reads of a large file: samples of each tensor, or blocks where no header names tensors.
SAMPLE_BYTES = 4096
BLOCKS, BLOCK_BYTES = 8, 1 << 20


def safetensors_header(file: Path) -> dict[str, dict[str, Any]]:
    """The entries of a safetensors file: `dtype`, `shape` and `data_offsets` of each tensor by its name.

    Raises:
        ValueError: the file is cut short, or is no safetensors file.
    """
    header, end = _read_header(file)
    header.pop("__metadata__", None)
    try:
        size = end + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        whole = all(isinstance(entry["dtype"], str) and isinstance(entry["shape"], list) for entry in header.values())
    except (TypeError, LookupError):
        whole = False
    if not whole:
        raise ValueError("has no safetensors header")
    if size != file.stat().st_size:
        raise ValueError("is cut short")
    return header


def safetensors_metadata(file: Path) -> dict[str, str]:
    """What the writer of a safetensors file noted in its header; raises as `safetensors_header` does."""
    found = _read_header(file)[0].get("__metadata__") or {}
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ValueError("has no safetensors header")
    return found


def _read_header(file: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and where it ends, in bytes."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        first = stream.read(8)
        if len(first) < 8 or (length := struct.unpack("<Q", first)[0]) > min(size, 100_000_000):
            raise ValueError("has no safetensors header")
        try:
            header = json.loads(stream.read(length))
        except (ValueError, RecursionError) as error:
            raise ValueError("has no safetensors header") from error
    if not isinstance(header, dict):
        raise ValueError("has no safetensors header")
    return header, 8 + length


def safetensors_parameters(file: Path) -> int:
    """Number of parameters in a safetensors file, from its header; raises as `safetensors_header` does."""
    entries = safetensors_header(file).values()
    return sum((e["data_offsets"][1] - e["data_offsets"][0]) // DTYPE_BYTES.get(e["dtype"], 4) for e in entries)


def weight_files(part: Path) -> tuple[list[Path], list[str]]:
    """Weight files of a part, and what is missing of them."""
    for index in sorted(part.glob("*.index*.json")):
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if missing := [f"{part.name}/{shard}" for shard in shards if not (part / shard).is_file()]:
            return [], missing
        return [part / shard for shard in shards], []
    files = sorted(part.glob("*.safetensors")) or sorted(part.glob("*.bin"))
    return files, [] if files else [f"{part.name}/*.safetensors"]


def tensor_shapes(part: Path) -> dict[str, tuple[int, ...]] | None:
    """Shape of each tensor of a part, from the headers; None where its weights are not safetensors."""
    files, _ = weight_files(part)
    if not files or any(file.suffix != ".safetensors" for file in files):
        return None
    return {name: tuple(entry["shape"]) for file in files for name, entry in safetensors_header(file).items()}


def check_model(name: str, option: str = "--model_name") -> list[str]:
    """Problems with the model an option names, one sentence each; none for a hub name, which cannot be looked into."""
    root = Path(name)
    if not root.exists():
        if HUB_NAME.fullmatch(name) and not name.startswith("."):
            return []
        return [
            f"{option}={name} is no directory and no hub name such as stabilityai/stable-diffusion-3.5-large; "
            "give the directory of a model or of a run."
        ]
    if not root.is_dir():
        return [f"{option}={name} is a file; give the directory with model_index.json in it."]
    missing = [] if (root / "model_index.json").is_file() else ["model_index.json"]
    missing += [what for part in MODELS for what in missing_files(root / part)]
    if not (root / "scheduler" / "scheduler_config.json").is_file():
        missing.append("scheduler/scheduler_config.json")
    missing += [what for part in TOKENIZERS for what in missing_tokenizer_files(root / part)]
    broken = [what for part in MODELS for what in damaged_files(root / part)]
    problems = []
    if missing:
        problems.append(f"{option}={name} is incomplete: {', '.join(missing)} missing; download the model again.")
    if broken:
        problems.append(f"{option}={name} is damaged: {'; '.join(broken)}; download these files again.")
    return problems


def missing_files(part: Path) -> list[str]:
    """Files that a part of the pipeline lacks, as the pipeline directory names them."""
    if not (part / "config.json").is_file():
        return [f"{part.name}/config.json"]
    return weight_files(part)[1]


def missing_tokenizer_files(part: Path) -> list[str]:
    """Files that a tokenizer lacks: CLIP's needs its vocabulary and merges, T5's either of two forms."""
    needed = [("tokenizer_config.json",)]
    needed += [("spiece.model", "tokenizer.json")] if part.name == "tokenizer_3" else [("vocab.json",), ("merges.txt",)]
    return [f"{part.name}/{names[0]}" for names in needed if not any((part / name).is_file() for name in names)]


def damaged_files(part: Path) -> list[str]:
    """Weight files of a part that are cut short or are something else, each with what is wrong."""
    found = []
    for file in weight_files(part)[0]:
        try:
            if file.suffix == ".safetensors":
                safetensors_parameters(file)
        except ValueError as error:
            found.append(f"{part.name}/{file.name} {error}")
    return found


def largest_side(transformer: Path, vae: Path) -> int:
    """Pixels of the longest side of a picture that the transformer has positions for, from both configurations."""
    config, of_vae = (json.loads((part / "config.json").read_text(encoding="utf-8")) for part in (transformer, vae))
    return config["pos_embed_max_size"] * config["patch_size"] * 2 ** (len(of_vae["block_out_channels"]) - 1)


def content_hash(parts: Iterable[Path]) -> str:
    """A hash of what the folders hold, in hexadecimal, under the names of the folders.

    Small files count whole. Of a safetensors file count its header and three short samples of every tensor: reading
    30 GB before each run would take longer than painting, and a tensor that was trained is changed all over. Of other
    large files count blocks spread evenly.
    """
    digest = hashlib.sha256()
    for folder in sorted(parts, key=lambda path: path.name):
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            size = file.stat().st_size
            digest.update(f"{folder.name}/{file.relative_to(folder).as_posix()} {size}\n".encode())
            with file.open("rb") as stream:
                for start, length in _sampled(file, size):
                    stream.seek(start)
                    digest.update(stream.read(length))
    return digest.hexdigest()


def _sampled(file: Path, size: int) -> Iterator[tuple[int, int]]:
    """Start and length of what counts of a file."""
    if size <= BLOCKS * BLOCK_BYTES:
        yield 0, size
        return
    try:
        spans = sorted(entry["data_offsets"] for entry in safetensors_header(file).values())
    except ValueError:
        yield from ((number * (size - BLOCK_BYTES) // (BLOCKS - 1), BLOCK_BYTES) for number in range(BLOCKS))
        return
    data = size - max(end for _, end in spans)
    yield 0, data
    for start, end in spans:
        length = min(SAMPLE_BYTES, end - start)
        for place in (start, (start + end - length) // 2, end - length):
            yield data + place, length


def file_hash(file: Path) -> str:
    """SHA-256 of a whole file, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
