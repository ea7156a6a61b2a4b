"""The files of an SD3 pipeline directory: which there must be, what their headers say, and a hash of them.

Reads headers and samples; loads nothing. Standard library only.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sd3.common.json_files import read_object
from sd3.common.part_contents import damaged_part
from sd3.common.safetensors_files import safetensors_header
from sd3.common.tokenizer_files import TOKENIZERS, damaged_objects, damaged_tokenizer_files, missing_tokenizer_files
from sd3.common.weight_files import MODELS, weight_files

INDEX = "model_index.json"
SCHEDULER = "scheduler/scheduler_config.json"
LIBRARIES = ("diffusers", "transformers")
PIPELINE = "StableDiffusion3"  # what the names of its classes begin with
T5_PARTS = ("text_encoder_3", "tokenizer_3")
# Folders that a pipeline may have; a model's own index of them is the word of whoever made the model.
PARTS = (*MODELS, *TOKENIZERS, "scheduler", "image_encoder", "feature_extractor")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# What the hash of a model reads of a large file: samples of each tensor, or blocks where no header names tensors.
SAMPLE_BYTES = 4096
BLOCKS, BLOCK_BYTES = 8, 1 << 20


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
    try:
        return [f"{option}={name} {problem}" for problem in _problems(root)]
    except ValueError as error:
        return [f"{option}={name} is damaged: {INDEX} {error}; download the model again."]


def _problems(root: Path) -> list[str]:
    """What is wrong with a pipeline directory, to stand after its name; raises as `absent_parts` does."""
    if (kind := _index(root).get("_class_name")) and PIPELINE not in str(kind):
        return [f"is a {kind}, expected a {PIPELINE}Pipeline; give a model of that kind."]
    if foreign := _foreign_parts(root):
        named = ", ".join(foreign)
        return [f"is refused: {INDEX} names {named}; expected only classes of {' and '.join(LIBRARIES)}."]
    absent, parts = absent_parts(root), parts_of(root)
    missing = [] if (root / INDEX).is_file() else [INDEX]
    missing += [f"{part} (null in {INDEX})" for part in parts if part in absent]
    # What the index does not name would be left out of the result of a fine-tune.
    missing += [f"{part} (not in {INDEX})" for part in parts if (root / INDEX).is_file() and part not in _index(root)]
    missing += [what for part in MODELS if part in parts for what in missing_files(root / part)]
    if not (root / SCHEDULER).is_file():
        missing.append(SCHEDULER)
    missing += [what for part in TOKENIZERS if part in parts for what in missing_tokenizer_files(root / part)]
    broken = [what for part in MODELS if part in parts for what in damaged_part(root / part)]
    broken += [what for part in TOKENIZERS if part in parts for what in damaged_tokenizer_files(root / part)]
    broken += damaged_objects([root / SCHEDULER])
    problems = []
    if missing:
        problems.append(f"is incomplete: {', '.join(missing)} missing; download the model again.")
    if broken:
        problems.append(f"is damaged: {'; '.join(broken)}; download these files again.")
    return problems


def missing_files(part: Path) -> list[str]:
    """Files that a part of the pipeline lacks, as the pipeline directory names them."""
    if not (part / "config.json").is_file():
        return [f"{part.name}/config.json"]
    return weight_files(part)[1]


def absent_parts(model: Path) -> set[str]:
    """Parts that the index of a pipeline directory says it does not have, whatever folders there are.

    Raises:
        ValueError: the index is not one.
    """
    index = _index(model)
    return {part for part in (*MODELS, *TOKENIZERS) if part in index and _is_absent(part, index[part])}


def _index(model: Path) -> dict[str, Any]:
    try:
        return read_object(model / INDEX, "an index of parts")
    except FileNotFoundError:
        return {}


def _foreign_parts(model: Path) -> list[str]:
    """Entries of the index that name something else than a class of the libraries.

    diffusers runs a Python file of the model's directory for a library that it does not know.
    """
    found = []
    for part, entry in _index(model).items():
        named = entry[0] if isinstance(entry, list) and entry else None
        if not part.startswith("_") and isinstance(named, str) and named not in LIBRARIES:
            found.append(f"{part} of {named!r:.80}")
    return found


def _is_absent(part: str, entry: object) -> bool:
    """Whether the index says that there is no such part, with null or, as save_pretrained writes it, [null, null]."""
    if entry is None or entry == [None, None]:
        return True
    if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(name, str) for name in entry):
        raise ValueError(f"has {entry!r:.80} for {part}, expected the names of a library and a class, or null")
    return False


def parts_of(model: Path) -> tuple[str, ...]:
    """Parts with folders that a pipeline has or should have: all, or all but T5 and its tokenizer.

    Without `text_encoder_3` nothing reads `tokenizer_3`. Raises as `absent_parts` does.
    """
    without = T5_PARTS if T5_PARTS[0] in absent_parts(model) else ()
    return tuple(part for part in (*MODELS, *TOKENIZERS, "scheduler") if part not in without)


def has_t5(model: Path) -> bool:
    """Has the pipeline directory a T5? Raises as `absent_parts` does."""
    return T5_PARTS[0] in parts_of(model)


def largest_side(transformer: Path, vae: Path) -> int:
    """Pixels of the longest side of a picture that the transformer has positions for, from both configurations.

    96 and 2 are defaults of diffusers' SD3Transformer2DModel.
    """
    config, of_vae = (read_object(part / "config.json") for part in (transformer, vae))
    stride = 2 ** (len(of_vae["block_out_channels"]) - 1)
    return config.get("pos_embed_max_size", 96) * config.get("patch_size", 2) * stride


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
