"""One measured start: a LoRA run of the native engine by its launcher, from the command to the end of its one step."""

from __future__ import annotations

import dataclasses
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

from sd3.common.command_line import UserError
from sd3.common.memory import anonymous_bytes

SD3 = Path(__file__).resolve().parents[1]
LAUNCHER = SD3 / "finetune_sd3_dreambooth_lora_fp16.sh"
MODEL = SD3 / "tiny_world" / "model"
WATCH_SECONDS = 0.1


@dataclasses.dataclass(frozen=True)
class Case:
    """What is trained on, and where its latents are: an empty `cache` is a new one for each pair of runs."""

    data: str
    cache: str = ""
    resolution: int = 64

    def command(self, cache: Path, output: Path) -> list[str]:
        """The launcher's command line."""
        return [
            *("bash", str(LAUNCHER), "--engine=native", "--device=cpu", "--mixed_precision=no"),
            *(f"--model_name={MODEL}", f"--input_dir={self.data}", f"--resolution={self.resolution}"),
            *("--batch_size=1", "--max_train_steps=1", "--validation_prompt=", "--seed=0"),
            *(f"--output_dir={output}", "--", f"--precompute_dir={cache}"),
        ]


@dataclasses.dataclass(frozen=True)
class Measured:
    """Seconds on the wall, CPU seconds of all processes of the run, and the most memory in bytes that they held.

    `first_...`: of the run that finds no latents; 0 where there was none. The others: of the run after it.
    """

    first_seconds: float
    first_cpu_seconds: float
    first_bytes: int
    seconds: float
    cpu_seconds: float
    peak_bytes: int


class ProcessesMemory:
    """Peak memory of a process and all that descend from it, between enter and exit."""

    def __init__(self, pid: int) -> None:
        """`pid`: of the first process."""
        self.pid, self.peak = pid, 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> ProcessesMemory:
        """Begin to watch."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop watching."""
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(WATCH_SECONDS):
            self.peak = max(self.peak, sum(anonymous_bytes(pid) for pid in descendants(self.pid)))


def descendants(pid: int) -> list[int]:
    """A process and all that descend from it, by number."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                # The name, in brackets, may hold anything; state and parent stand behind it.
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, ValueError, IndexError):
                continue  # ended meanwhile
            children.setdefault(parent, []).append(int(entry.name))
    found = [pid]
    for one in found:  # grows as it is gone through
        found += children.get(one, [])
    return found


def start_once(case: Case, cache: Path, output: Path) -> tuple[float, float, int]:
    """Run the launcher to its end; seconds on the wall, CPU seconds and peak memory in bytes.

    Raises:
        UserError: it failed.
    """
    environment = os.environ | {"SD3_PYTHON": sys.executable, "HF_HUB_OFFLINE": "1"}
    log = output.with_suffix(".log")
    with log.open("wb") as stream:
        since, cpu_since = time.perf_counter(), _cpu_seconds()
        run = subprocess.Popen(
            case.command(cache, output), stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, env=environment
        )
        with ProcessesMemory(run.pid) as memory:
            status = run.wait()
            seconds, cpu_seconds = time.perf_counter() - since, _cpu_seconds() - cpu_since
    if status:
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no message"]
        raise UserError(f"the launcher ended with status {status}: {said[-1]}", 1)
    return seconds, cpu_seconds, memory.peak


def _cpu_seconds() -> float:
    """CPU time of the children that have ended, and of theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run_case(case: Case, folder: Path) -> Measured:
    """Start a run on a new cache and then a second one; only the latter where the case has a cache of its own."""
    first, cache = (0.0, 0.0, 0), Path(case.cache)
    if not case.cache:
        cache = folder / "precomputed"
        first = start_once(case, cache, folder / "first")
    return Measured(*first, *start_once(case, cache, folder / "second"))
