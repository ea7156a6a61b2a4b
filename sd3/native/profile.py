"""Where a step's time goes: torch's profiler over a few steps, as a table and a trace for a browser."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import torch

from sd3.common.files import new_file, write_text
from sd3.native.options import PROFILE_WARM_UP as WARM_UP

logger = logging.getLogger(__name__)
ROWS = 40


class Profile:
    """Profiles `steps` steps after the warm-up, none where `steps` is 0; `close` it when the run ends."""

    def __init__(self, steps: int, folder: Path, rank: int, device_type: str) -> None:
        """`folder` receives rank-N.txt and rank-N.json, the latter for chrome://tracing or ui.perfetto.dev.

        Kernels are recorded on CUDA alone; elsewhere it is what the CPU does.
        """
        self.first, self.last = WARM_UP + 1, WARM_UP + steps
        self.folder, self.rank = folder, rank
        self.profiler: torch.profiler.profile | None = None
        self.made = 0  # steps so far
        self.activities = [torch.profiler.ProfilerActivity.CPU]
        if device_type == "cuda":
            self.activities.append(torch.profiler.ProfilerActivity.CUDA)

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around the step `number` of this start of the run, from 1."""
        if number == self.first <= self.last:
            self.profiler = torch.profiler.profile(activities=self.activities)
            self.profiler.start()
        yield
        self.made = number
        if number == self.last:
            self._write()

    def close(self) -> None:
        """Write what was profiled of a run that ended before its time, and say how many steps that is."""
        if self.first <= self.last and self.made < self.last:
            logger.warning(
                "--profile=%d: the run ended after %d steps, of which the first %d are warm-up; %d were profiled.",
                self.last - WARM_UP, self.made, WARM_UP, max(self.made - WARM_UP, 0),
            )  # fmt: skip
            self._write()

    def _write(self) -> None:
        """Table and trace, if there is something to write."""
        if self.profiler is None:
            return
        self.profiler.stop()
        by = "self_cuda_time_total" if len(self.activities) > 1 else "self_cpu_time_total"
        table = self.profiler.key_averages().table(sort_by=by, row_limit=ROWS)
        write_text(self.folder / f"rank-{self.rank}.txt", table + "\n")
        with new_file(self.folder / f"rank-{self.rank}.json") as aside:
            self.profiler.export_chrome_trace(str(aside))
        self.profiler = None
