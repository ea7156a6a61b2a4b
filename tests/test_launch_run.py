"""A launcher's run: its directory, its secrets, its exit status, its signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from launching import BF16, DDP, PROJECT, environment, fake_project, launch, start
from sd3.common.supervise import send

TOKEN = "hf_not_a_real_token_0123456789"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_project(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def arguments(tmp_path: Path, tiny_model: Path, dog_dir: Path) -> list[str]:
    data = [f"--model_name={tiny_model}", f"--input_dir={dog_dir}", "--device=cpu", "--mixed_precision=bf16"]
    return [*data, "--resolution=64", f"--output_dir={tmp_path / 'the run'}"]


def until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def processes_with(marker: str) -> list[int]:
    """Live processes that have STUB_MARKER=marker in their environment."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z" and f"STUB_MARKER={marker}".encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def test_the_run_directory_is_whole_and_holds_no_secret(project: Path, arguments: list[str], tmp_path: Path) -> None:
    result = launch(
        project, DDP, *arguments, "--", f"--hub_token={TOKEN}", "--push_to_hub", WANDB_API_KEY="wandb-secret-0123456789"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("engine: diffusers")
    run = tmp_path / "the run"
    held = {path.name for path in run.iterdir()}
    assert {"train.log", "command.sh", "environment.json", "run_settings.json", "report.json"} <= held
    assert "SD3_Dreambooth_bf16_1p_bs1.log" in held
    assert "data: 5 images, 1 caption\n" in result.stdout
    assert json.loads((run / "data.json").read_text())["images"]["count"] == 5
    seen = json.loads((run / "stub-0.json").read_text())
    (run / "stub-0.json").unlink()
    assert seen["environment"]["HF_TOKEN"] == TOKEN
    assert "--push_to_hub" in seen["arguments"]
    assert not [argument for argument in seen["arguments"] if TOKEN in argument]
    for file in run.iterdir():
        assert TOKEN.encode() not in file.read_bytes(), file
        assert b"wandb-secret" not in file.read_bytes(), file
    assert "stub started ***" in (run / "train.log").read_text()
    assert TOKEN not in result.stdout
    for line in ("Final Performance images/sec : n/a", "Final Train Loss : n/a", "E2E Training Duration sec : "):
        assert line in result.stdout
    command = (run / "command.sh").read_text()
    assert command.startswith("#!/usr/bin/env bash\n")
    assert "--push_to_hub" in command


def test_the_exit_status_is_the_trainings(project: Path, arguments: list[str]) -> None:
    assert launch(project, DDP, *arguments, STUB_EXIT="1").returncode == 1


def test_the_users_environment_wins(project: Path, arguments: list[str], tmp_path: Path) -> None:
    assert launch(project, DDP, *arguments, OMP_NUM_THREADS="3").returncode == 0
    seen = json.loads((tmp_path / "the run" / "stub-0.json").read_text())["environment"]
    assert seen["OMP_NUM_THREADS"] == "3"
    assert seen["TOKENIZERS_PARALLELISM"] == "false"
    assert "HCCL_CONNECT_TIMEOUT" not in seen  # means nothing off an NPU


@pytest.mark.parametrize(("launcher", "ranks"), [(DDP, 1), (BF16, 2)])
def test_on_the_cpu_no_library_sees_an_accelerator(
    project: Path, arguments: list[str], tmp_path: Path, launcher: str, ranks: int
) -> None:
    """Else the ranks of DeepSpeed would share the one card of a machine, and end."""
    hidden = {"CUDA_VISIBLE_DEVICES": "", "ASCEND_RT_VISIBLE_DEVICES": ""}
    cards = dict.fromkeys(hidden, "0,1")
    ports = ["--main_process_port=29540", f"--num_processors={ranks}"]
    assert launch(project, launcher, *arguments, *ports, **cards).returncode == 0
    run = tmp_path / "the run"
    for rank in range(ranks):
        seen = json.loads((run / f"stub-{rank}.json").read_text())["environment"]
        assert {name: seen[name] for name in hidden} == hidden
        (run / f"stub-{rank}.json").unlink()
    # So does the command that is written down.
    again = subprocess.run(["bash", str(run / "command.sh")], env=environment(**cards), capture_output=True)
    assert again.returncode == 0
    seen = json.loads((run / "stub-0.json").read_text())["environment"]
    assert {name: seen[name] for name in hidden} == hidden


@pytest.mark.parametrize(("launcher", "ranks"), [(DDP, 1), (DDP, 2), (BF16, 2)])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_reaches_the_ranks_which_get_their_time(
    project: Path, arguments: list[str], tmp_path: Path, launcher: str, ranks: int, number: int, status: int
) -> None:
    marker = tmp_path.name
    process = start(
        project, launcher, *arguments, f"--num_processors={ranks}", "--main_process_port=29533",
        STUB_MODE="careful", STUB_MARKER=marker,
    )  # fmt: skip
    run = tmp_path / "the run"
    until(lambda: all((run / f"ready-{rank}").exists() for rank in range(ranks)))
    os.kill(process.pid, number)
    process.communicate(timeout=60)
    assert process.returncode == status
    assert all((run / f"finished-{rank}").exists() for rank in range(ranks))
    assert processes_with(marker) == []
    assert (run / "report.json").exists()


def test_a_signal_to_every_process_of_the_run_leaves_the_rank_its_time(
    project: Path, arguments: list[str], tmp_path: Path
) -> None:
    """As Slurm sends it: accelerate dies of it."""
    marker = tmp_path.name
    process = start(project, DDP, *arguments, STUB_MODE="careful", STUB_MARKER=marker)
    run = tmp_path / "the run"
    until((run / "ready-0").exists)
    for pid in sorted(processes_with(marker), reverse=True):  # the supervisor after accelerate
        send(pid, signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert (run / "finished-0").exists()
    assert processes_with(marker) == []


@pytest.mark.parametrize(("launcher", "ranks"), [(DDP, 1), (DDP, 2), (BF16, 2)])
def test_bad_input_is_one_sentence_and_status_2_whatever_accelerate_makes_of_it(
    project: Path, arguments: list[str], tmp_path: Path, launcher: str, ranks: int
) -> None:
    result = launch(
        project, launcher, *arguments, f"--num_processors={ranks}", "--main_process_port=29538", STUB_MODE="refuse"
    )
    assert result.returncode == 2, result.stdout + result.stderr
    assert (tmp_path / "the run" / "train.log").read_text().splitlines()[-1] == "--data is no data; give some."
    said = result.stdout + result.stderr
    assert said.count("--data is no data; give some.") == 1
    assert "Traceback" not in said and "exitcode" not in said


def test_ctrl_c_in_a_terminal_signals_the_whole_group(project: Path, arguments: list[str], tmp_path: Path) -> None:
    marker = tmp_path.name
    process = start(project, DDP, *arguments, STUB_MODE="careful", STUB_MARKER=marker)
    run = tmp_path / "the run"
    until((run / "ready-0").exists)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert (run / "finished-0").exists()
    assert processes_with(marker) == []


@pytest.mark.parametrize("ranks", [1, 2])
def test_stubborn_ranks_are_killed_after_the_grace(
    project: Path, arguments: list[str], tmp_path: Path, ranks: int
) -> None:
    marker = tmp_path.name
    process = start(
        project, DDP, *arguments, f"--num_processors={ranks}", "--main_process_port=29534",
        STUB_MODE="stubborn", STUB_MARKER=marker, SD3_STOP_GRACE="3",
    )  # fmt: skip
    run = tmp_path / "the run"
    until(lambda: all((run / f"ready-{rank}").exists() for rank in range(ranks)))
    begun = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert 2.5 < time.monotonic() - begun < 30
    assert processes_with(marker) == []


@pytest.mark.parametrize(("launcher", "ranks"), [(DDP, 1), (BF16, 2)])
def test_a_second_signal_ends_the_run_at_once(
    project: Path, arguments: list[str], tmp_path: Path, launcher: str, ranks: int
) -> None:
    marker = tmp_path.name
    process = start(
        project, launcher, *arguments, f"--num_processors={ranks}", "--main_process_port=29535",
        STUB_MODE="stubborn", STUB_MARKER=marker, SD3_STOP_GRACE="600",
    )  # fmt: skip
    run = tmp_path / "the run"
    until(lambda: all((run / f"ready-{rank}").exists() for rank in range(ranks)))
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(1)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143
    assert processes_with(marker) == []


def test_ranks_can_still_talk_to_each_other_after_a_signal(project: Path, arguments: list[str], tmp_path: Path) -> None:
    process = start(
        project, DDP, *arguments, "--num_processors=2", "--main_process_port=29536", STUB_MODE="together"
    )  # fmt: skip
    run = tmp_path / "the run"
    until(lambda: all((run / f"ready-{rank}").exists() for rank in (0, 1)))
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert all((run / f"finished-{rank}").exists() for rank in (0, 1))


def test_a_directory_in_use_is_refused_and_then_free(project: Path, arguments: list[str], tmp_path: Path) -> None:
    process = start(project, DDP, *arguments, STUB_MODE="wait")
    until((tmp_path / "the run" / "ready-0").exists)
    refused = launch(project, DDP, *arguments)
    assert refused.returncode == 2
    assert "is in use by a run that is still going" in refused.stderr
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=60)
    assert launch(project, DDP, *arguments).returncode == 0


def test_a_file_system_without_locks_is_no_run_that_goes_on(
    project: Path, arguments: list[str], tmp_path: Path
) -> None:
    """flock(1) exits with 1 for a conflict alone: 71 is what it says of ENOLCK."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "flock").write_text("#!/bin/sh\nexit 71\n")
    (tmp_path / "bin" / "flock").chmod(0o755)
    result = launch(project, DDP, *arguments, PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert result.returncode == 0, result.stderr
    assert f"{tmp_path / 'the run'} cannot be locked" in result.stderr


@pytest.mark.parametrize(
    ("before", "status"), [("", 143), ("sleep 60 & ", 7)], ids=["no supervisor yet", "its number not yet taken"]
)
def test_a_signal_while_the_supervisor_is_started_is_not_lost(before: str, status: int) -> None:
    """The traps are set first, and so have to do without the supervisor, or find it by themselves."""
    script = f"""{before}. {PROJECT}/sd3/launch/launch.sh
        trap 'pass_on TERM 143' TERM
        kill -TERM $$
        wait; exit 7"""
    begun = time.monotonic()
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (status, "")
    assert time.monotonic() - begun < 30


def test_a_bare_resume_takes_this_launchers_newest_run(project: Path, arguments: list[str]) -> None:
    without_output = [argument for argument in arguments if not argument.startswith("--output_dir")]
    runs = project / "logs" / DDP.removesuffix(".sh")
    refused = launch(project, DDP, *without_output, "--resume")
    assert refused.returncode == 2
    assert "holds no run" in refused.stderr
    for name in ("20260101T000000Z", "20260102T000000Z"):
        (runs / name / "checkpoint-3").mkdir(parents=True)
        (runs / name / "checkpoint-3" / "complete").touch()
    assert launch(project, DDP, *without_output, "--resume").returncode == 0
    seen = json.loads((runs / "20260102T000000Z" / "stub-0.json").read_text())["arguments"]
    assert "--resume_from_checkpoint=latest" in seen
    assert f"--output_dir={runs / '20260102T000000Z'}" in seen
