"""What was found out about files, kept between runs by their names, sizes and times, so that no file is read twice.

It is a memory and no more: where it cannot be read or written, files are read again and one line says so. Many
processes may use it at once. A file that is replaced by one of the same size and times is taken for the old one.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

FILE_NAME = "seen-files.sqlite3"
LOCKED_SECONDS = 3.0  # that another process may hold the file
NAMES_PER_QUERY = 500
TABLE = """CREATE TABLE IF NOT EXISTS seen (
    kind TEXT, name BLOB, stamp TEXT NOT NULL, value TEXT NOT NULL, PRIMARY KEY (kind, name)) WITHOUT ROWID"""
Result = TypeVar("Result")


class SeenFiles:
    """The memory in a directory; `say` is given the line, once, where it cannot be used."""

    def __init__(self, folder: Path | None, say: Callable[[str], object]) -> None:
        """`folder` is made when something is remembered; None for no memory."""
        self.file, self._say, self._usable = (folder or Path()) / FILE_NAME, say, folder is not None

    def recall(self, kind: str, names: Sequence[str], stamps: Sequence[str | None]) -> list[str | None]:
        """What was remembered of each name under the same stamp, else None; under a stamp of None nothing is."""
        keys = [os.fsencode(name) for name in names]
        found: dict[bytes, tuple[str, str]] = {}
        if self._usable and self.file.exists():
            found = self._with(lambda memory: _select(memory, kind, keys), found)
        pairs = (found.get(key, (None, None)) for key in keys)
        return [
            value if wanted is not None and stamp == wanted else None
            for (stamp, value), wanted in zip(pairs, stamps, strict=True)
        ]

    def remember(self, kind: str, rows: Iterable[tuple[str, str, str]]) -> None:
        """Keep name, stamp and value of each row, in place of what is known of the same name."""
        if values := [(kind, os.fsencode(name), stamp, value) for name, stamp, value in rows]:
            self._with(lambda memory: _insert(memory, values), None)

    def _with(self, work: Callable[[sqlite3.Connection], Result], otherwise: Result) -> Result:
        """What `work` returns, or `otherwise` once the memory has failed."""
        if not self._usable:
            return otherwise
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.closing(sqlite3.connect(self.file, timeout=LOCKED_SECONDS)) as memory:
                memory.execute("PRAGMA trusted_schema = OFF")  # the file may be anybody's
                return work(memory)
        except (sqlite3.Error, OSError) as error:
            self._usable = False
            self._say(f"{self.file} cannot be used ({error}), so files are read again; remove it if that stays so.")
            return otherwise


def _select(memory: sqlite3.Connection, kind: str, keys: Sequence[bytes]) -> dict[bytes, tuple[str, str]]:
    """Stamp and value by name."""
    found: dict[bytes, tuple[str, str]] = {}
    if memory.execute("SELECT 1 FROM sqlite_master WHERE name = 'seen'").fetchone() is None:
        return found
    for start in range(0, len(keys), NAMES_PER_QUERY):
        some = keys[start : start + NAMES_PER_QUERY]
        query = f"SELECT name, stamp, value FROM seen WHERE kind = ? AND name IN ({','.join('?' * len(some))})"
        found |= {name: (stamp, value) for name, stamp, value in memory.execute(query, [kind, *some])}
    return found


def _insert(memory: sqlite3.Connection, values: Sequence[tuple[str, bytes, str, str]]) -> None:
    with memory:  # all of them or none
        memory.execute(TABLE)
        memory.executemany("INSERT OR REPLACE INTO seen VALUES (?, ?, ?, ?)", values)
