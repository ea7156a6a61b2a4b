"""Launcher and supervisor killed with -9 in the middle of real trainings: nothing stays, and --resume works at once."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from launching import DDP, LORA, PROJECT, environment
from patching import free_port
from sd3.common.supervise import descendants
from test_launch_run import processes_with, until

DIFFUSERS = (pytest.mark.upstream, pytest.mark.long)
RUNS = [
    ("native", LORA, 1, 2, "both"),
    pytest.param("native", DDP, 1, 0, "launcher", marks=pytest.mark.long),
    pytest.param("native", DDP, 2, 0, "supervisor", marks=pytest.mark.long),
    pytest.param("native", LORA, 2, 2, "both", marks=pytest.mark.long),
    pytest.param("diffusers", LORA, 1, 0, "launcher", marks=DIFFUSERS),
    pytest.param("diffusers", LORA, 1, 2, "both", marks=DIFFUSERS),
    pytest.param("diffusers", DDP, 2, 0, "supervisor", marks=DIFFUSERS),
    pytest.param("diffusers", LORA, 2, 2, "both", marks=DIFFUSERS),
]


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A directory for temporary files whose name is short, as pytest's are not."""
    folder = Path(tempfile.mkdtemp(prefix="t-"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[str]:
    """What the processes of this test have in their environment; none outlives it."""
    yield tmp_path.name
    for pid in processes_with(tmp_path.name):
        os.kill(pid, signal.SIGKILL)


def supervisor_of(launcher: int) -> int:
    (found,) = (
        pid for pid, parent in descendants(launcher).items()
        if parent == launcher and b"sd3.common.supervise" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )  # fmt: skip
    return found


@pytest.mark.parametrize(("engine", "launcher", "ranks", "workers", "victims"), RUNS)
def test_a_killed_run_leaves_no_process_and_is_resumed_at_once(
    engine: str, launcher: str, ranks: int, workers: int, victims: str,
    request: pytest.FixtureRequest, tiny_model: Path, dog_dir: Path, tmp_path: Path, scratch: Path, marker: str,
) -> None:  # fmt: skip
    if engine == "diffusers":
        request.getfixturevalue("upstream_checkout")
    output = tmp_path / "run"
    command = ["bash", str(PROJECT / "sd3" / launcher), f"--model_name={tiny_model}", f"--input_dir={dog_dir}"]
    command += [f"--engine={engine}", f"--num_processors={ranks}", f"--dataloader_num_workers={workers}", "--seed=0"]
    command += ["--device=cpu", "--mixed_precision=bf16", "--resolution=64", "--batch_size=1", f"--output_dir={output}"]
    command += [f"--main_process_port={free_port()}", "--checkpointing_steps=1"]
    env = environment(STUB_MARKER=marker, TMPDIR=str(scratch), SD3_STOP_GRACE="20")
    last = ["--", "--checkpoints_total_limit=2", "--num_validation_images=1"]
    process = subprocess.Popen(
        [*command, "--max_train_steps=100000", *last], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    until(lambda: process.poll() is not None or list(output.glob("checkpoint-[2-9]/complete")), 200)
    assert process.poll() is None, (output / "train.log").read_text()
    # The patched scripts have new loader processes in each epoch.
    until(lambda: len(processes_with(marker)) >= 3 + ranks * (1 + workers))
    kill = {"launcher": [process.pid], "supervisor": [supervisor_of(process.pid)]}
    for pid in kill.get(victims, kill["launcher"] + kill["supervisor"]):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    until(lambda: not processes_with(marker), 30)
    step = max(int(path.parent.name.split("-")[1]) for path in output.glob("checkpoint-*/complete"))
    resumed = subprocess.run(
        [*command, f"--max_train_steps={step + 1}", "--resume", *last], env=env, capture_output=True, text=True
    )
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert list(scratch.iterdir()) == []  # nor did the killed run leave anything there
