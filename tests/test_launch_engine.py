"""Which engine a launcher takes, what it says of it, and that a run without any checkout is recorded whole."""

from __future__ import annotations

import json
import shlex
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

from launching import DDP, LAUNCHERS, environment, fake_project, launch


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose set-up found no source of diffusers."""
    return fake_project(tmp_path_factory.mktemp("bare"), checkout=False)


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_project(tmp_path_factory.mktemp("patched"))


@pytest.fixture
def arguments(tmp_path: Path, tiny_model: Path, dog_dir: Path) -> list[str]:
    data = [f"--model_name={tiny_model}", f"--input_dir={dog_dir}", "--device=cpu", "--mixed_precision=bf16"]
    return [*data, "--resolution=64", f"--output_dir={tmp_path / 'the run'}"]


def script_of(command: str) -> str:
    return next(word for word in shlex.split(command) if Path(word).name.startswith("train_dreambooth"))


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_without_a_checkout_every_launcher_takes_the_native_engine(
    bare: Path, arguments: list[str], launcher: str
) -> None:
    result = launch(bare, launcher, *arguments, "--dry-run")
    assert result.returncode == 0, result.stderr
    first, *_, last = result.stdout.splitlines()
    assert first.startswith("engine: native (the patched scripts cannot be used: there is no checkout at ")
    name = "train_dreambooth_lora_sd3.py" if "lora" in launcher else "train_dreambooth_sd3.py"
    assert script_of(last) == str(bare / "sd3" / "native" / name)


def test_a_run_without_a_checkout_is_recorded_whole(bare: Path, arguments: list[str], tmp_path: Path) -> None:
    result = launch(bare, DDP, *arguments, STUB_EXIT="1")
    assert result.returncode == 1
    run = tmp_path / "the run"
    recorded = json.loads((run / "environment.json").read_text())
    assert recorded["engine"] == "native"
    assert recorded["library"] == f"diffusers {version('diffusers')}, as installed"
    assert not {"upstream_commit", "patches", "patched_ids"} & set(recorded)
    assert json.loads((run / "run_settings.json").read_text())["engine"] == "native"
    report = json.loads((run / "report.json").read_text())
    assert (report["settings"]["engine"], report["exit_status"]) == ("native", 1)
    # The command that is written down does the same again, from anywhere.
    seen = json.loads((run / "stub-0.json").read_text())
    (run / "stub-0.json").unlink()
    again = subprocess.run(
        ["bash", str(run / "command.sh")], cwd=tmp_path, env=environment(PYTHONPATH="mine"), capture_output=True
    )
    assert again.returncode == 0, again.stderr
    repeated = json.loads((run / "stub-0.json").read_text())
    assert repeated["arguments"] == seen["arguments"]
    assert repeated["environment"]["PYTHONPATH"] == f"{bare}:mine"


def test_a_launcher_runs_its_own_project_wherever_it_is_started(
    bare: Path, arguments: list[str], tmp_path: Path
) -> None:
    """In another copy of the project Python would find that one's modules first."""
    other = tmp_path / "other" / "sd3"
    modules = ("common/devices", "launch/preflight", "common/run_environment", "common/supervise", "common/report")
    for module in modules:
        assert (bare / "sd3" / f"{module}.py").is_file()
        (other / module).parent.mkdir(parents=True, exist_ok=True)
        (other / f"{module}.py").write_text("raise SystemExit(9)\n")
    for package in (other, other / "common", other / "launch"):
        (package / "__init__.py").touch()
    result = launch(bare, DDP, *arguments, cwd=tmp_path / "other")
    assert result.returncode == 0, result.stdout + result.stderr
    made = {path.name for path in (tmp_path / "the run").iterdir()}
    assert {"environment.json", "report.json", "stub-0.json"} <= made


def test_a_run_of_the_patched_scripts_records_their_ids(patched: Path, arguments: list[str], tmp_path: Path) -> None:
    result = launch(patched, DDP, *arguments)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("engine: diffusers (the patched checkout in build/diffusers is as it should be)\n")
    recorded = json.loads((tmp_path / "the run" / "environment.json").read_text())
    assert recorded["engine"] == "diffusers"
    assert [path for path, _ in recorded["patched_ids"]] == [
        "examples/dreambooth/train_dreambooth_sd3.py", "examples/dreambooth/train_dreambooth_lora_sd3.py",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["native", "diffusers"])
def test_the_engine_asked_for_is_taken(patched: Path, arguments: list[str], name: str) -> None:
    result = launch(patched, DDP, *arguments, f"--engine={name}", "--dry-run")
    assert result.stdout.startswith(f"engine: {name} (asked for)\n")
    assert ("/sd3/native/" in script_of(result.stdout.splitlines()[-1])) == (name == "native")


def test_patched_scripts_that_are_asked_for_have_to_be_there(bare: Path, arguments: list[str]) -> None:
    result = launch(bare, DDP, *arguments, "--engine=diffusers")
    assert (result.returncode, result.stdout) == (3, "")
    assert "there is no checkout at" in result.stderr
    assert f"Run: bash {bare}/setup_env.sh" in result.stderr


def test_a_changed_checkout_is_no_engine(tmp_path: Path, arguments: list[str]) -> None:
    project = fake_project(tmp_path)
    scripts = project / "build" / "diffusers" / "examples" / "dreambooth"
    for script in scripts.iterdir():
        script.write_text(script.read_text() + "\n# edited\n")
    result = launch(project, DDP, *arguments, "--dry-run")
    assert result.returncode == 0, result.stderr
    first = result.stdout.splitlines()[0]
    assert first.startswith("engine: native (the patched scripts cannot be used: ")
    assert first.count(" has id ") == 2
    refused = launch(project, DDP, *arguments, "--engine=diffusers")
    assert refused.returncode == 3
    assert refused.stderr.count("\n") == 1


def test_a_run_goes_on_with_the_engine_that_began_it(
    patched: Path, bare: Path, arguments: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "the run"
    assert launch(patched, DDP, *arguments, "--engine=native").returncode == 0
    (run / "checkpoint-1").mkdir()
    (run / "checkpoint-1" / "complete").touch()
    resumed = launch(patched, DDP, *arguments, "--resume", "--dry-run")
    assert resumed.stdout.startswith("engine: native (it began the run)\n"), resumed.stderr
    settings = run / "run_settings.json"
    settings.write_text(settings.read_text().replace('"engine": "native"', '"engine": "diffusers"'))
    assert launch(bare, DDP, *arguments, "--resume", "--dry-run").returncode == 3


@pytest.mark.parametrize(("began", "mistaken"), [("native", "diffusers"), ("diffusers", "native")])
def test_another_engine_cannot_go_on_with_a_run_and_leaves_its_record_alone(
    patched: Path, arguments: list[str], tmp_path: Path, began: str, mistaken: str
) -> None:
    run = tmp_path / "the run"
    assert launch(patched, DDP, *arguments, f"--engine={began}").returncode == 0
    (run / "checkpoint-1").mkdir()
    (run / "checkpoint-1" / "complete").touch()
    refused = launch(patched, DDP, *arguments, "--resume", f"--engine={mistaken}")
    assert (refused.returncode, refused.stdout) == (2, "")
    said = f"--engine={mistaken} cannot go on with the checkpoints of {run}, which are of --engine={began}"
    assert said in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert json.loads((run / "run_settings.json").read_text())["engine"] == began
    same = launch(patched, DDP, *arguments, "--resume", f"--engine={began}", "--dry-run")
    assert same.stdout.startswith(f"engine: {began} (asked for)\n"), same.stderr


@pytest.mark.parametrize("resume", ["latest", "checkpoint-1"])
def test_a_checkpoint_tells_its_engine_where_the_settings_are_of_another_start(
    patched: Path, arguments: list[str], tmp_path: Path, resume: str
) -> None:
    run = tmp_path / "the run"
    assert launch(patched, DDP, *arguments, "--engine=diffusers").returncode == 0  # in the directory of a native run
    (run / "checkpoint-1").mkdir()
    for name in ("manifest.json", "complete"):
        (run / "checkpoint-1" / name).touch()
    resumed = launch(patched, DDP, *arguments, f"--resume={resume}", "--dry-run")
    assert resumed.stdout.startswith("engine: native (it began the run)\n"), resumed.stderr
