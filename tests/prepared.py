"""What is made once and kept between runs, by whichever of the processes that run the tests comes first."""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Callable
from pathlib import Path

from repository import PROJECT

PREPARED = PROJECT / "build" / "tests"


def made_once(target: Path, maker: Callable[[Path], None]) -> Path:
    """The directory target, which maker makes where it is not there; nobody else makes or sees it meanwhile."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            maker(target)
    return target


def prepared(name: str, maker: Callable[..., None]) -> Path:
    """A directory made by maker, kept between runs for as long as maker's source file stays the same."""
    source = Path(maker.__code__.co_filename).read_bytes()
    return made_once(PREPARED / f"{name}-{hashlib.sha256(source).hexdigest()[:12]}", maker)
