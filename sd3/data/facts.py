"""What is known of an image file once it was looked at: identity, size, conversions, and whether it can be used."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from sd3.data.decoding import ImageError, inspect

Item = TypeVar("Item")
Result = TypeVar("Result")
MOST_WORKERS = 32  # each may have a whole image in memory
WAITING_PER_WORKER = 2  # decoded images that wait for their turn: a photograph of 12 megapixels takes 36 MB


@dataclass(frozen=True)
class ImageFacts:
    """Of the bytes: `digest`, SHA-256 in hexadecimal. Of the upright image: its size and what was converted.

    `problem` says why it cannot be used, to stand after the file's name; None for a good image, whose size is then set.
    """

    digest: str
    width: int = 0
    height: int = 0
    changes: tuple[str, ...] = ()
    problem: str | None = None

    @property
    def square(self) -> bool:
        """Is there only one place to cut a square from?"""
        return self.width == self.height

    def as_text(self) -> str:
        """To be kept."""
        return json.dumps([self.digest, self.width, self.height, self.changes, self.problem])

    @classmethod
    def from_text(cls, text: object) -> ImageFacts | None:
        """What `as_text` gave; None for anything else."""
        try:
            digest, width, height, changes, problem = json.loads(text)  # type: ignore[arg-type]
            found = cls(digest, int(width), int(height), tuple(map(str, changes)), problem and str(problem))
            return found if re.fullmatch("[0-9a-f]{64}", digest) and (width > 0 and height > 0 or problem) else None
        except (ValueError, TypeError):
            return None


def facts_of(content: bytes) -> ImageFacts:
    """Look at an encoded image, all of it."""
    digest = hashlib.sha256(content).hexdigest()
    try:
        (width, height), changes = inspect(content)
    except ImageError as error:
        return ImageFacts(digest, problem=f"cannot be read as an image ({error})")
    return ImageFacts(digest, width, height, changes)


def processors() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_parallel(function: Callable[[Item], Result], items: Iterable[Item], workers: int = 0) -> Iterator[Result]:
    """The results for the items, in their order, computed by threads; only a few wait to be taken at any time.

    Pillow and hashlib let go of the interpreter while they work, so threads use all cores; `workers`: how many, 0 for
    one per core, MOST_WORKERS at most.
    """
    workers = workers or min(processors(), MOST_WORKERS)
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > workers * WAITING_PER_WORKER:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
