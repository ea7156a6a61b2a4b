"""Where a step's time goes: torch's profiler over a few steps, as a table and a trace for a browser."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from sd3.common.files import new_file, write_text

WARM_UP = 2  # steps that are not profiled: caches, compilation, allocation
ROWS = 40


class Profile:
    """Profiles `steps` steps after the warm-up; none where `steps` is 0."""

    def __init__(self, steps: int, folder: Path, rank: int, device_type: str) -> None:
        """`folder` receives rank-N.txt and rank-N.json, the latter for chrome://tracing or ui.perfetto.dev."""
        self.first, self.last = WARM_UP + 1, WARM_UP + steps
        self.folder, self.rank = folder, rank
        self.profiler: torch.profiler.profile | None = None
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
        if self.profiler is not None and number == self.last:
            self.profiler.stop()
            by = "self_cuda_time_total" if len(self.activities) > 1 else "self_cpu_time_total"
            table = self.profiler.key_averages().table(sort_by=by, row_limit=ROWS)
            write_text(self.folder / f"rank-{self.rank}.txt", table + "\n")
            with new_file(self.folder / f"rank-{self.rank}.json") as aside:
                self.profiler.export_chrome_trace(str(aside))
            self.profiler = None
