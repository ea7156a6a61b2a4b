"""What a run tells about itself: loss, learning rate, pictures a second and utilization, to progress line and tracker.

The losses stay on the device and are read together every few steps, so that no step waits for the one before.
"""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from sd3.native.tracking import forgiven
from sd3.native.utilization import peak_of

logger = logging.getLogger(__name__)


class LineByLine:
    """Standard error for a progress bar where it is not a terminal: each redraw becomes a line."""

    def write(self, text: str) -> None:
        """Write what is not blank."""
        if text.strip():
            sys.stderr.write(text.strip() + "\n")

    def flush(self) -> None:
        """As a file's."""
        sys.stderr.flush()


@dataclass(frozen=True)
class Reading:
    """One step, read back."""

    step: int
    position: int  # of its first sample in the stream
    loss: float  # mean over its batches and all ranks
    gradient_norm: float  # before clipping; 0 where fp16 overflowed and the step was skipped


class Metrics:
    """Collects losses; `read` brings them to the host, the progress line and the trackers."""

    def __init__(
        self, accelerator: Accelerator, samples_a_step: int, work: float, device_name: str, first: int, last: int
    ) -> None:
        """`work`: operations for a sample; `first`: steps already made, `last`: steps in all.

        A sample counts as one image, with prior preservation too, where it is two pictures: as the pinned scripts
        count.
        """
        self.accelerator, self.samples_a_step, self.work = accelerator, samples_a_step, work
        peak = peak_of(device_name)
        self.peak = peak and peak * accelerator.num_processes
        on_terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=last, initial=first, desc="Steps", disable=not accelerator.is_local_main_process,
            **({} if on_terminal else {"file": LineByLine(), "mininterval": math.inf}),
        )  # fmt: skip
        # Step, position, loss and gradient norm [2], learning rate.
        self.waiting: list[tuple[int, int, torch.Tensor, float]] = []
        self.skipped = 0  # steps in which fp16 overflowed
        self.since = time.time()

    def add(self, step: int, position: int, loss: torch.Tensor, gradient_norm: torch.Tensor, rate: float) -> None:
        """Note a step's loss and its gradient's norm, scalars on the device."""
        self.waiting.append((step, position, torch.stack([loss, gradient_norm]), rate))

    def read(self) -> list[Reading]:
        """Read what is waiting; every rank calls this at the same step."""
        if not self.waiting:
            return []
        found = torch.stack([values for _, _, values, _ in self.waiting])
        losses, norms = self.accelerator.reduce(found, "mean").T.tolist()
        now = time.time()
        norms = self._without_overflows(norms)
        seconds = (now - self.since) / len(losses)
        speed = self.samples_a_step / seconds
        for number, ((step, _, _, rate), loss, norm) in enumerate(zip(self.waiting, losses, norms, strict=True), 1):
            values = {"loss": loss, "lr": rate, "images": self.samples_a_step, "images_per_second": speed}
            values |= {"gradient_norm": norm}
            if self.peak:
                values["utilization"] = speed * self.work / self.peak
            self._track(values, step, self.since + number * seconds)
        used = f"{speed * self.work / self.peak:.1%}" if self.peak else "n/a"
        postfix = {"loss": f"{losses[-1]:.4f}", "lr": f"{self.waiting[-1][3]:.2e}", "images/s": f"{speed:.2f}"}
        self.bar.set_postfix({**postfix, "utilization": used}, refresh=False)
        self.bar.update(len(losses))
        self.bar.refresh()
        readings = [
            Reading(step, position, loss, norm)
            for (step, position, _, _), loss, norm in zip(self.waiting, losses, norms, strict=True)
        ]
        self.waiting, self.since = [], now
        return readings

    def _without_overflows(self, norms: list[float]) -> list[float]:
        """In fp16 a gradient that overflows is normal now and then: the step is skipped, and the loss scaled less."""
        if self.accelerator.mixed_precision != "fp16":
            return norms
        skipped = sum(not math.isfinite(norm) for norm in norms)
        if skipped:
            self.skipped += skipped
            logger.warning(
                "fp16 overflowed: %d of the last %d steps were skipped, %d of this start of the run.", skipped,
                len(norms), self.skipped,
            )  # fmt: skip
        return [norm if math.isfinite(norm) else 0.0 for norm in norms]

    def _track(self, values: dict[str, float], step: int, wall_time: float) -> None:
        """Tell the trackers; TensorBoard with the time at which the step ended, not that at which it was read."""
        with forgiven(self.accelerator):
            for tracker in self.accelerator.trackers:
                if tracker.name == "tensorboard":
                    for name, value in values.items():
                        tracker.writer.add_scalar(name, value, step, walltime=wall_time)
                    tracker.writer.flush()
                else:
                    tracker.log(values, step=step)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """While something is done that is no training; its time does not count."""
        began = time.time()
        try:
            yield
        finally:
            self.since += time.time() - began

    def close(self) -> None:
        """End the progress line."""
        self.bar.close()
