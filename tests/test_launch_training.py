"""Real trainings through the launchers, on the CPU with the tiny model."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from launching import BF16, DDP, LAUNCHERS, LORA, PROJECT, environment
from patching import free_port
from sd3.common.supervise import send

ENGINES = [pytest.param("diffusers", marks=pytest.mark.upstream), "native"]


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    """Each test runs with both engines; the patched scripts need their checkout."""
    if request.param == "diffusers":
        request.getfixturevalue("upstream_checkout")
    return request.param


@pytest.fixture
def tiny(tiny_model: Path, engine: str) -> list[str]:
    settings = ["--device=cpu", "--mixed_precision=bf16", "--resolution=64", "--batch_size=1", "--seed=0"]
    return [f"--model_name={tiny_model}", f"--main_process_port={free_port()}", f"--engine={engine}", *settings]


def resumed_from(run: Path, checkpoint: str) -> bool:
    """Does the log say so? Each engine in its words."""
    log = (run / "train.log").read_text()
    return f"Resuming from checkpoint {checkpoint}" in log or f"Resuming from {run / checkpoint}." in log


def launch(launcher: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(PROJECT / "sd3" / launcher), *arguments],
        env=environment(**env), capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=600,
    )  # fmt: skip


def report_of(run: Path) -> dict:
    return json.loads((run / "report.json").read_text(encoding="utf-8"))


def test_deepspeed_with_validation_checkpoint_and_resume(
    tmp_path: Path, tiny: list[str], engine: str, pokemon_dir: Path
) -> None:
    run = tmp_path / "run"
    arguments = [*tiny, f"--dataset_name={pokemon_dir}", "--num_processors=2", "--checkpointing_steps=4"]
    arguments += ["--validation_prompt=a red creature", f"--output_dir={run}"]
    script = ["--", "--validation_epochs=1", "--num_validation_images=1", "--checkpoints_total_limit=1"]
    first = launch(BF16, *arguments, "--max_train_steps=8", *script)
    assert first.returncode == 0, first.stdout + first.stderr
    own = {"diffusers": "pytorch_model", "native": "deepspeed"}[engine]  # DeepSpeed's own part
    assert (run / "checkpoint-8" / own).is_dir()
    assert not (run / "checkpoint-4").exists()
    resumed = launch(BF16, *arguments, "--max_train_steps=12", "--resume", *script)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert resumed_from(run, "checkpoint-8")
    report = report_of(run)
    assert (report["last_step"], report["sessions"], report["steps"]) == (12, 2, 12)
    assert report["images_received"] == 24
    assert report["images_per_second"] > 0
    assert f"Final Train Loss : {report['final_train_loss']:.6f}" in resumed.stdout
    assert (run / "report.png").exists()
    assert list(run.glob("validation-*.png"))
    assert (run / "model_index.json").exists()
    # The command that is written down runs: here only as far as its help.
    command = (run / "command.sh").read_text()
    assert subprocess.run(["bash", "-n", str(run / "command.sh")]).returncode == 0
    assert "--resume_from_checkpoint=latest" in command


@pytest.mark.long
@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("processes", [1, 2])
def test_every_launcher_runs_to_its_end(
    tmp_path: Path, tiny: list[str], pokemon_dir: Path, dog_dir: Path, launcher: str, processes: int
) -> None:
    data = f"--dataset_name={pokemon_dir}" if "deepspeed" in launcher else f"--input_dir={dog_dir}"
    run = tmp_path / "run"
    arguments = [*tiny, data, f"--num_processors={processes}", "--max_train_steps=4", "--checkpointing_steps=2"]
    result = launch(launcher, *arguments, f"--output_dir={run}", "--", "--num_validation_images=1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert (run / "checkpoint-4" / "complete").exists()
    assert (run / ("pytorch_lora_weights.safetensors" if "lora" in launcher else "model_index.json")).exists()
    kind = "DistributedType.DEEPSPEED" if "deepspeed" in launcher else "MULTI_CPU" if processes == 2 else "NO"
    assert kind in (run / "train.log").read_text()
    assert report_of(run)["last_step"] == 4
    assert report_of(run)["images_received"] == 4 * processes


def test_a_launcher_without_any_checkout_trains_and_stops_on_a_signal(
    tmp_path: Path, tiny_model: Path, dog_dir: Path
) -> None:
    """--engine=auto where set-up found no source: the native engine, stopped by SIGTERM, then resumed to its end."""
    project = tmp_path / "project"
    for name in ("sd3", "patches"):
        shutil.copytree(PROJECT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    run = tmp_path / "run"
    arguments = ["bash", str(project / "sd3" / LORA), f"--model_name={tiny_model}", f"--input_dir={dog_dir}"]
    arguments += ["--device=cpu", "--mixed_precision=bf16", "--resolution=64", "--batch_size=1", "--num_processors=1"]
    arguments += ["--validation_prompt=", f"--output_dir={run}"]
    process = subprocess.Popen(
        [*arguments, "--max_train_steps=100000"], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    end = time.monotonic() + 120
    while not (run / "train.log").exists() or "loss=" not in (run / "train.log").read_text():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.1)
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert output.startswith("engine: native (")
    (made,) = run.glob("checkpoint-*/complete")
    steps = int(made.parent.name.split("-")[1])
    result = subprocess.run(
        [*arguments, f"--max_train_steps={steps + 2}", "--resume"], env=environment(), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert resumed_from(run, made.parent.name)
    assert report_of(run)["last_step"] == steps + 2
    assert (run / "pytorch_lora_weights.safetensors").exists()


def processes_of(run: Path) -> list[int]:
    """The live processes that have the run's directory on their command line, this one apart."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if int(entry.name) != os.getpid() and str(run).encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


@pytest.mark.long
@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (2, 1)])
def test_a_signal_to_every_process_leaves_a_checkpoint(
    tmp_path: Path, tiny_model: Path, dog_dir: Path, processes: int, workers: int
) -> None:
    """As Slurm sends it: to launcher, supervisor, accelerate, ranks and loader processes."""
    run = tmp_path / "run"
    arguments = ["bash", str(PROJECT / "sd3" / LORA), f"--model_name={tiny_model}", f"--input_dir={dog_dir}"]
    arguments += ["--device=cpu", "--mixed_precision=bf16", "--resolution=64", "--batch_size=1", "--engine=native"]
    arguments += [f"--num_processors={processes}", f"--dataloader_num_workers={workers}", "--validation_prompt="]
    arguments += ["--max_train_steps=100000", f"--main_process_port={free_port()}", f"--output_dir={run}"]
    process = subprocess.Popen(
        arguments, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    end = time.monotonic() + 240
    while not (run / "train.log").exists() or "loss=" not in (run / "train.log").read_text():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.1)
    for pid in sorted(processes_of(run), reverse=True):  # the supervisor after accelerate
        send(pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 143, output
    (made,) = run.glob("checkpoint-*/complete")
    assert f"{made.parent.name} is complete" in output
    assert "killed by signal" not in output


@pytest.mark.long
def test_a_damaged_checkpoint_is_one_sentence_with_several_ranks(
    tmp_path: Path, tiny_model: Path, dog_dir: Path
) -> None:
    run = tmp_path / "run"
    arguments = [f"--model_name={tiny_model}", f"--input_dir={dog_dir}", "--device=cpu", "--mixed_precision=bf16"]
    arguments += ["--resolution=64", "--batch_size=1", "--engine=native", "--num_processors=2", "--validation_prompt="]
    arguments += [f"--main_process_port={free_port()}", "--checkpointing_steps=1", f"--output_dir={run}"]
    assert launch(LORA, *arguments, "--max_train_steps=1").returncode == 0
    (run / "checkpoint-1" / "state.json").write_text("{}")
    result = launch(LORA, *arguments, "--max_train_steps=2", "--resume")
    assert result.returncode == 2, result.stdout + result.stderr
    assert (result.stdout + result.stderr).count("is damaged") == 1
    assert "Traceback" not in result.stdout + result.stderr


@pytest.mark.long
def test_the_dog_folder_at_batch_8(tmp_path: Path, tiny: list[str], engine: str, dog_dir: Path) -> None:
    """The published scripts train on 5 images a step, as many as there are; the native engine fills the batch."""
    run = tmp_path / "run"
    arguments = ("--batch_size=8", f"--input_dir={dog_dir}", "--max_train_steps=4", f"--output_dir={run}")
    result = launch(DDP, *tiny, *arguments)
    assert result.returncode == 0, result.stderr
    assert report_of(run)["images_received"] == 4 * {"diffusers": 5, "native": 8}[engine]


@pytest.mark.long
def test_killed_and_resumed(tmp_path: Path, tiny: list[str], dog_dir: Path) -> None:
    """kill -9 of everything, right after a checkpoint, then --resume."""
    run = tmp_path / "run"
    arguments = [*tiny, f"--input_dir={dog_dir}", "--num_processors=2", "--checkpointing_steps=3"]
    arguments += [f"--output_dir={run}", "--validation_prompt="]
    process = subprocess.Popen(
        ["bash", str(PROJECT / "sd3" / BF16), *arguments, "--max_train_steps=100000"],
        env=environment(STUB_MARKER="killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    end = time.monotonic() + 180
    while not list(run.glob("checkpoint-*/complete")):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.2)
    for pid in processes_of(run):
        os.kill(pid, signal.SIGKILL)
    process.wait(timeout=30)
    steps = max(int(path.parent.name.split("-")[1]) for path in run.glob("checkpoint-*/complete"))
    result = launch(BF16, *arguments, f"--max_train_steps={steps + 3}", "--resume")
    assert result.returncode == 0, result.stdout + result.stderr
    assert report_of(run)["last_step"] == steps + 3
    assert resumed_from(run, f"checkpoint-{steps}")


@pytest.mark.long
@pytest.mark.parametrize("launcher", [BF16, DDP])
def test_two_machines_over_loopback(
    tmp_path: Path, tiny: list[str], engine: str, dog_dir: Path, launcher: str
) -> None:
    run = tmp_path / "run"
    arguments = [*tiny, f"--input_dir={dog_dir}", "--num_machines=2", "--num_processors=1", "--max_train_steps=4"]
    arguments += ["--checkpointing_steps=2", "--main_process_ip=127.0.0.1", f"--output_dir={run}"]
    arguments += ["--validation_prompt="]
    machines = [
        subprocess.Popen(
            ["bash", str(PROJECT / "sd3" / launcher), *arguments, f"--machine_rank={rank}"],
            env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    output = [machine.communicate(timeout=300)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], "\n".join(output)
    if engine == "diffusers":
        states = {path.name for path in (run / "checkpoint-4").glob("random_states_*")}
        assert states == {"random_states_0.pkl", "random_states_1.pkl"}
    assert report_of(run)["images_received"] == 8
    assert (run / "train-machine-1.log").exists()
