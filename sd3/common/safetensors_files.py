"""What the header of a safetensors file says. Standard library only."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "F8_E4M3": 1, "F8_E5M2": 1}


def safetensors_header(file: Path) -> dict[str, dict[str, Any]]:
    """The entries of a safetensors file: `dtype`, `shape` and `data_offsets` of each tensor by its name.

    Raises:
        ValueError: the file is cut short, or is not a safetensors file.
    """
    header, end = _read_header(file)
    header.pop("__metadata__", None)
    if not all(map(_is_entry, header.values())):
        raise ValueError("has no safetensors header")
    size = end + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != file.stat().st_size:
        raise ValueError("is cut short")
    return header


def _is_entry(entry: object) -> bool:
    """Is it what a header says of a tensor?"""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    offsets = entry.get("data_offsets")
    if not isinstance(entry.get("shape"), list) or not isinstance(offsets, list) or len(offsets) != 2:
        return False
    return all(type(number) is int for number in offsets) and 0 <= offsets[0] <= offsets[1]


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
