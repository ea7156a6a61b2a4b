"""The files of the repository, for tests that read all of them."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
# The models that ship: files that libraries wrote, weights among them, all together below so many bytes.
MODELS = {"sd3/tiny_world/model/": 8_000_000, "sd3/tiny_world/judge/": 1_000_000}


@cache
def tracked_files() -> tuple[Path, ...]:
    """Every file git tracks, or would track if it were added, as absolute paths."""
    command = ["git", "-C", str(PROJECT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    paths = (PROJECT / name for name in sorted(set(listed.split("\0"))) if name)
    return tuple(path for path in paths if path.is_file())


def relative(path: Path) -> str:
    """The path as the repository names it."""
    return path.relative_to(PROJECT).as_posix()


@cache
def text_of(path: Path) -> str:
    """The text of one file; bytes that are not UTF-8 are kept as escapes."""
    return path.read_bytes().decode("utf-8", "backslashreplace")
