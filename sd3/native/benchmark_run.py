"""One measured run in a process of its own: the real training script of either engine, ended after its last step.

Neither script knows of it. The steps are counted by a hook that torch calls after each step of any optimizer.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from sd3.common.command_line import UserError
from sd3.common.memory import PeakMemory, device_module
from sd3.native.utilization import device_name

PROJECT = Path(__file__).resolve().parents[2]
FOLDERS = {
    "upstream": PROJECT / "build" / "diffusers" / "examples" / "dreambooth",
    "native": PROJECT / "sd3" / "native",
}
SCRIPTS = {"full": "train_dreambooth_sd3.py", "lora": "train_dreambooth_lora_sd3.py"}
PROMPT = "a photo of sks dog"
CAPTION_COLUMN = "text"


@dataclasses.dataclass(frozen=True)
class Case:
    """What is trained, and how: the same for both engines."""

    model: str  # its directory
    data: str  # folder of pictures; with captions in its metadata.jsonl where those are each picture's own
    kind: str  # full or lora
    captions: str  # each: one for each picture, or one: the same for all
    device: str
    precision: str  # as --mixed_precision
    resolution: int
    pictures: int
    batch_size: int
    checkpointing: bool  # of activations
    warm_up: int  # steps before the measured ones
    steps: int

    def arguments(self, engine: str, folder: Path) -> list[str]:
        """The flags of the run in `folder`; those of one engine alone keep its computed latents and embeds to the run,
        so that each run computes them."""
        data = [f"--dataset_name={self.data}", f"--caption_column={CAPTION_COLUMN}"]
        if self.captions == "one":
            data = [f"--instance_data_dir={self.data}"]
        return [
            *(f"--pretrained_model_name_or_path={self.model}", f"--output_dir={folder / 'run'}", *data),
            *(
                f"--instance_prompt={PROMPT}",
                f"--resolution={self.resolution}",
                f"--train_batch_size={self.batch_size}",
            ),
            *(f"--max_train_steps={self.warm_up + self.steps}", "--learning_rate=1e-5", "--lr_warmup_steps=0"),
            *(f"--mixed_precision={self.precision}", "--report_to=tensorboard", "--seed=0"),
            *(["--gradient_checkpointing"] if self.checkpointing else []),
            *([f"--precompute_dir={folder / 'precomputed'}"] if engine == "native" else []),
        ]


@dataclasses.dataclass(frozen=True)
class Measured:
    """Of the measured steps together, seconds on the wall and of this process's CPU time; `seconds` is the one that is
    compared. Peak memory in bytes from before the first weight is loaded to the last step. `precompute_seconds` went,
    on the clock of `seconds`, into latents and embeds before the training."""

    seconds: float
    wall_seconds: float
    cpu_seconds: float
    precompute_seconds: float
    peak_bytes: int
    pictures: int
    threads: int
    device: str  # what it calls itself


class Enough(BaseException):
    """The last measured step is done; no exception that a script would handle."""


class Clocks:
    """The wall's and the process's, and which of them counts.

    On a CPU, that others may share, the process's own time counts; on a device what a user waits for.
    """

    def __init__(self, device: torch.device) -> None:
        """`device`: of the training."""
        self._module = device_module(device)

    def now(self) -> tuple[float, float]:
        """Wall and CPU time in seconds, when all that was asked of the device is done."""
        if self._module:
            self._module.synchronize()
        return time.perf_counter(), time.process_time()

    def counting(self, since: tuple[float, float], until: tuple[float, float]) -> float:
        """Seconds between two readings on the clock that counts."""
        which = 0 if self._module else 1
        return until[which] - since[which]


class Steps:
    """Counts optimizer steps; reads the clocks after the last one of the warm-up and after the last one of all."""

    def __init__(self, warm_up: int, steps: int, now: Callable[[], Any]) -> None:
        """`now` reads the clocks."""
        self.warm_up, self.last, self.now = warm_up, warm_up + steps, now
        self.done = 0
        self.since = self.until = None

    def count(self, *_: object) -> None:
        """The hook. Raises Enough after the last step."""
        self.done += 1
        if self.done == self.warm_up:
            self.since = self.now()
        elif self.done == self.last:
            self.until = self.now()
            raise Enough


class Precomputing:
    """Adds up the time that the native engine spends on what it computes before the training."""

    def __init__(self, clocks: Clocks) -> None:
        """`clocks` to read."""
        self.clocks, self.seconds = clocks, 0.0

    def watch(self) -> None:
        """From now on."""
        from sd3.native.precompute import Precompute

        for name in ("latents", "prompts"):
            setattr(Precompute, name, self._timed(getattr(Precompute, name)))

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def run(*arguments: Any, **keywords: Any) -> Any:  # noqa: ANN401
            since = self.clocks.now()
            try:
                return method(*arguments, **keywords)
            finally:
                self.seconds += self.clocks.counting(since, self.clocks.now())

        return run


def run_case(case: Case, engine: str, folder: Path) -> Measured:
    """Train with `engine`, upstream or native, in `folder`.

    Raises:
        UserError: the script ended before its last step.
        SystemExit: the script refused.
    """
    device = torch.device(case.device)
    # Nothing is fetched, and the copies that datasets makes end with the run.
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "datasets")}
    if device.type == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    clocks = Clocks(device)
    steps, precomputing = Steps(case.warm_up, case.steps, clocks.now), Precomputing(clocks)
    if engine == "native":
        precomputing.watch()
    script = FOLDERS[engine] / SCRIPTS[case.kind]
    sys.argv = [str(script), *case.arguments(engine, folder)]
    sys.path[0] = str(script.parent)
    with PeakMemory(device) as memory, register_optimizer_step_post_hook(steps.count):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except Enough:
            pass
        except SystemExit as end:
            if end.code:
                raise
    if steps.since is None or steps.until is None:
        raise UserError(f"{script.name} ended after {steps.done} of {steps.last} steps.", 1)
    return Measured(
        seconds=clocks.counting(steps.since, steps.until),
        wall_seconds=steps.until[0] - steps.since[0],
        cpu_seconds=steps.until[1] - steps.since[1],
        precompute_seconds=precomputing.seconds,
        peak_bytes=memory.peak,
        pictures=case.steps * case.batch_size,
        threads=torch.get_num_threads(),
        device=device_name(device),
    )
