"""One bar over all pictures of all processes; the first process alone shows it."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

BAR = "{desc} {percentage:3.0f}%|{bar}| {elapsed}, {remaining} to go"
POLL_SECONDS = 1.0


class Progress:
    """Counts denoising steps: this process's own as they are made, other processes' by the files that appear."""

    def __init__(self, own: int, others: Sequence[Path], steps: int, show: bool) -> None:
        """`own` pictures of this process and the files of `others`, each of `steps` steps."""
        self._others = {path: _stamp(path) for path in others} if show else {}
        self._steps = steps
        self._own = 0
        self._elsewhere = 0
        self._polled = 0.0
        self._pictures = own + len(others)
        # A log gets a line now and then, a terminal a bar that moves.
        interval = 0.2 if sys.stderr.isatty() else 30.0
        total, desc = self._pictures * steps, f"Painting 0/{self._pictures}"
        self._bar = tqdm(total=total, desc=desc, bar_format=BAR, mininterval=interval, disable=not show)

    def __enter__(self) -> Progress:
        """Show the bar."""
        self.refresh()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the bar as it stands: full, unless something went wrong."""
        if kind is None:
            self._show(self._bar.total)
        self._bar.close()

    def step(self, pictures: int) -> None:
        """One denoising step of so many pictures was made here."""
        self._own += pictures
        self.refresh()

    def refresh(self) -> None:
        """Show what was made since."""
        now = time.monotonic()
        if self._others and now - self._polled >= POLL_SECONDS:
            self._polled = now
            self._elsewhere = sum(_stamp(path) != before for path, before in self._others.items())
        self._show(self._own + self._elsewhere * self._steps)

    def _show(self, steps: int) -> None:
        self._bar.set_description_str(f"Painting {steps // self._steps}/{self._pictures}", refresh=False)
        self._bar.update(steps - self._bar.n)


def _stamp(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None
