"""How many tokens T5 read of a prompt in training: where runs write it down, and where generation finds it.

SD3's encoders have no mask, so padding is part of what the transformer learns to read: a prompt of a few words padded
to another length gives another image.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from sd3.common.command_line import UserError
from sd3.common.model_files import INDEX
from sd3.common.safetensors_files import safetensors_metadata

DEFAULT = 256  # of StableDiffusion3Pipeline, for models and LoRA files that say nothing
LONGEST = 512  # that StableDiffusion3Pipeline takes
RUN_SETTINGS = "run_settings.json"
KEY = "max_sequence_length"  # in run_settings.json and in the header of a LoRA
INDEX_KEY = f"_{KEY}"  # diffusers passes over keys of its index that begin with an underscore


class TrainedLength(NamedTuple):
    """`tokens` that T5 read of a prompt in training, and the file that says so."""

    tokens: int
    file: Path


def find_trained_length(files: Iterable[Path]) -> TrainedLength | None:
    """The length that the first of these files states: LoRA files, pipeline indices, settings of runs.

    Files that are absent or state none are passed over.

    Raises:
        UserError: a file states something else than a number of tokens.
    """
    for file in files:
        stated = _stated(file)
        if stated is None:
            continue
        try:
            tokens = int(str(stated))
        except ValueError:
            tokens = 0
        if not 1 <= tokens <= LONGEST:
            raise UserError(
                f"{file} says {KEY}={stated}, and expected is a whole number from 1 to {LONGEST}; give "
                "--max-sequence-length."
            )
        return TrainedLength(tokens, file)
    return None


def _stated(file: Path) -> object:
    if not file.is_file():
        return None
    if file.suffix == ".safetensors":
        try:
            return safetensors_metadata(file).get(KEY)
        except (OSError, ValueError):
            return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values.get(INDEX_KEY if file.name == INDEX else KEY) if isinstance(values, dict) else None


def write_to_index(file: Path, tokens: int) -> None:
    """Add the length to the index of a pipeline directory."""
    index = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(index | {INDEX_KEY: tokens}, indent=2) + "\n", encoding="utf-8")
