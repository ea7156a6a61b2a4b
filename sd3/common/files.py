"""Files and directories that appear whole or not at all. Standard library only."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


def sync(path: Path) -> None:
    """Bring what was written to `path`, a file or a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _mode_of_new(mode: int) -> int:
    """`mode` as the process's umask would leave it; what tempfile makes is for the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    return mode & ~mask


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; on leaving without an error it is synced and renamed to `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    os.close(descriptor)
    aside = Path(name)
    try:
        yield aside
        sync(aside)
        aside.chmod(_mode_of_new(0o666))
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to `path`, replacing what is there in one step."""
    with new_file(path) as aside:
        aside.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def new_directory(path: Path, option: str) -> Iterator[Path]:
    """A directory beside `path` to fill; on leaving without an error its files are synced and it becomes `path`.

    Raises:
        FileExistsError: `path` exists and is not an empty directory; the text names `option`, as the next one's does.
        OSError: it cannot be made.
    """
    path = Path(os.path.abspath(path))
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{option} {path} exists and is not an empty directory; name a new one.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise OSError(f"{option} {path} cannot be made: {error.strerror}; name another directory.") from None
    try:
        yield aside
        for file in aside.rglob("*"):
            sync(file)
        aside.chmod(_mode_of_new(0o777))
        os.replace(aside, path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    sync(path.parent)
