"""Runs of launchers and scripts on emulated cards, and the line each leaves for the table of runs."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from emulated_cann.build import BUILT
from emulated_npu import EmulatedNpu
from native_runs import losses
from patching import free_port
from repository import PROJECT
from sd3.inference.sheet import SHEET

RECORD = BUILT / "runs.jsonl"  # for the table in emulated_cann/README.md
# What torch_npu prints where an operator has no kernel on the card, and where float64 was asked for.
UNWANTED = ("will fall back to run on the CPU", "do not support double dtype", "emulated CANN:", "Traceback")


@dataclass
class Finished:
    """A run that ended with 0."""

    output: Path
    log: str

    @property
    def losses(self) -> list[float]:
        """Of each step."""
        return list(losses(self.output).values())


def train(
    npu: EmulatedNpu, output: Path, launcher: str, *arguments: str, ranks: int = 1, device: str = "npu"
) -> Finished:
    """A launcher's run; torch_npu's warnings about float64 are DeepSpeed's own and pass there."""
    command = ["bash", str(PROJECT / "sd3" / launcher), f"--device={device}", f"--num_processors={ranks}"]
    command += ["--resolution=64", "--batch_size=2", "--seed=1", f"--main_process_port={free_port()}"]
    started = time.monotonic()
    done = npu.run([*command, f"--output_dir={output}", *arguments], cards=ranks if device == "npu" else 0, timeout=600)
    log = done.stdout + done.stderr
    assert done.returncode == 0, log
    ours = [text for text in UNWANTED if text in log and not ("double" in text and "deepspeed" in launcher)]
    assert not ours, log
    finished = Finished(output, log)
    settings = json.loads((output / "run_settings.json").read_text(encoding="utf-8"))
    _record(settings["launcher"], settings["engine"], settings["mixed_precision"], ranks, device, finished, started)
    return finished


def generate(npu: EmulatedNpu, output: Path, script: str, *arguments: str, ranks: int = 1) -> list[bytes]:
    """The images of an inference script, in the order of their names."""
    launch = [sys.executable]
    if ranks > 1:
        launch += ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={free_port()}"]
    launch += [str(PROJECT / "sd3" / script), "--device=npu", "--height=64", "--width=64", "--steps=2"]
    done = npu.run([*launch, f"--output-dir={output}", *arguments], cards=ranks)
    log = done.stdout + done.stderr
    assert done.returncode == 0, log
    assert not [text for text in UNWANTED if text in log], log
    return [path.read_bytes() for path in sorted(output.rglob("*.png")) if path.name != SHEET]


def _record(
    launcher: str, engine: str, precision: str, ranks: int, device: str, finished: Finished, started: float
) -> None:
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    line = {"launcher": launcher, "engine": engine, "precision": precision, "ranks": ranks, "device": device}
    line |= {"losses": finished.losses, "seconds": round(time.monotonic() - started, 1)}
    with RECORD.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
