"""Tensors on disk under the hash of what they were computed from; written once, read by any run that needs the same.

A file holds safetensors and nothing else, so reading one executes nothing. It appears whole or not at all. Runs that
compute the same entry at the same time may differ in its last bits; the later one's stays. What is read is the file
itself, mapped into memory: the processes of a machine share its pages, and the system takes them back where memory is
short.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sd3.common.command_line import UserError
from sd3.common.files import new_file
from sd3.common.seen import SeenFiles

logger = logging.getLogger(__name__)
Tensors = dict[str, torch.Tensor]
Shapes = dict[str, tuple[int | None, ...]]  # by the tensors' names; None for any number
LEFTOVER_AGE = 24 * 3600  # s
KIND = "entry"  # of what is remembered about files
KEPT_BYTES = 64 << 20  # of files that one process keeps mapped


class Cache:
    """The entries below a directory."""

    def __init__(self, folder: Path) -> None:
        """`folder` is made when the first entry is written."""
        self.folder = folder
        self.seen = SeenFiles(folder, logger.warning)
        self._kept: dict[str, Tensors] = {}
        self._room = KEPT_BYTES

    def sweep(self) -> None:
        """Remove what killed runs left half-written; what is young may be another run's at work."""
        for file in self.folder.glob("*/.*.safetensors"):
            with contextlib.suppress(OSError):
                if time.time() - file.stat().st_mtime > LEFTOVER_AGE:
                    file.unlink()

    @staticmethod
    def key(**facts: object) -> str:
        """The name of an entry: a hash of everything that its tensors depend on."""
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def file(self, key: str) -> Path:
        """Where an entry lies."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def holds(self, key: str, shapes: Shapes) -> bool:
        """Is there a whole entry with these tensors? Anything else counts as none, and is computed again."""
        if not self.file(key).is_file():
            return False
        try:
            found = self.read(key)
        except (SafetensorError, OSError) as error:
            wrong = str(error)
        else:
            wrong = _unlike(found, shapes)
        if wrong:
            self._kept.pop(key, None)
            logger.warning("%s is damaged (%s) and will be computed again.", self.file(key), wrong)
        return not wrong

    def all_held(self, keys: Sequence[str], shapes: Shapes) -> list[bool]:
        """What `holds` says of each entry; what was found whole is not read again while it is the same."""
        stamps = [self._stamp(key) for key in keys]
        value = json.dumps(shapes)
        known = self.seen.recall(KIND, keys, stamps)
        held = [found == value or self.holds(key, shapes) for key, found in zip(keys, known, strict=True)]
        self.seen.remember(KIND, [
            (key, stamp, value)
            for key, stamp, found, whole in zip(keys, stamps, known, held, strict=True)
            if whole and stamp and found != value
        ])  # fmt: skip
        return held

    def note_written(self, keys: Sequence[str], shapes: Shapes) -> None:
        """Entries of these shapes were just written and need not be read to be found whole."""
        value = json.dumps(shapes)
        self.seen.remember(KIND, [(key, stamp, value) for key in keys if (stamp := self._stamp(key))])

    def _stamp(self, key: str) -> str | None:
        """By what an entry's file is known again, None where there is none."""
        try:
            found = os.stat(f"{self.folder}/{key[:2]}/{key}.safetensors")  # a Path for each takes as long again
        except OSError:
            return None
        return f"{found.st_size} {found.st_mtime_ns}"

    def read(self, key: str) -> Tensors:
        """The tensors of an entry, on the CPU; they are the file's pages and not to be written to.

        Raises:
            SafetensorError, OSError: it is not there or not whole.
        """
        if key not in self._kept:
            tensors = load_file(self.file(key))
            size = sum(tensor.nbytes for tensor in tensors.values())
            if size > self._room:
                return tensors
            self._room -= size
            self._kept[key] = tensors
        return self._kept[key]

    def write(self, key: str, tensors: Tensors) -> None:
        """Store an entry.

        Raises:
            UserError: it cannot be written.
        """
        try:
            with new_file(self.file(key)) as aside:
                save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, aside)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"--precompute_dir={self.folder} cannot be written ({error}); free some space or name another.", 1
            ) from None


def _unlike(tensors: Tensors, shapes: Shapes) -> str:
    """What keeps the tensors from being those that were expected; empty if nothing does."""
    if tensors.keys() != shapes.keys():
        return f"it holds {', '.join(tensors) or 'nothing'}, expected {', '.join(shapes)}"
    for name, shape in shapes.items():
        found = tuple(tensors[name].shape)
        if len(found) != len(shape) or any(want not in (None, side) for side, want in zip(found, shape, strict=True)):
            return f"{name} has shape {found}, expected {shape}"
        if not tensors[name].isfinite().all():
            return f"{name} is not finite"
    return ""


def compute_missing(
    cache: Cache,
    keys: Sequence[str],
    shapes: Shapes,
    compute: Callable[[list[int]], list[Tensors]],
    chunk_size: int,
    mine: Callable[[int], bool],
    progress: Callable[[int], object],
    announce: Callable[[list[int]], object] = lambda _: None,
) -> int:
    """Fill in the entries that are not there, a chunk of `chunk_size` at a time; returns how many were written.

    A chunk with an entry missing is computed whole: the composition of a batch can show in the last bits of its
    results, and a run that was killed half-way must end with the very entries of one that was not.

    `shapes`: of an entry's tensors. `compute` maps places in `keys` to their tensors; `mine` says of a chunk's number
    whether this rank computes it; `progress` is told how many places are done; `announce` gets, before the first
    `compute`, all places that it will be given.
    """
    chunks = [range(first, min(first + chunk_size, len(keys))) for first in range(0, len(keys), chunk_size)]
    share = [chunk for number, chunk in enumerate(chunks) if mine(number)]
    places = [place for chunk in share for place in chunk]
    held = dict(zip(places, cache.all_held([keys[place] for place in places], shapes), strict=True))
    unfinished = [chunk for chunk in share if not all(held[place] for place in chunk)]
    progress(len(places) - sum(map(len, unfinished)))
    announce([place for chunk in unfinished for place in chunk])
    written: list[str] = []
    try:
        for chunk in unfinished:
            for place, tensors in zip(chunk, compute(list(chunk)), strict=True):
                if not held[place]:
                    cache.write(keys[place], tensors)
                    written.append(keys[place])
            progress(len(chunk))
    finally:
        cache.note_written(written, shapes)
    return len(written)
