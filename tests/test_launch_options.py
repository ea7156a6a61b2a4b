"""What a launcher accepts, refuses and would run."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from launching import BF16, DDP, LAUNCHERS, fake_project, launch


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_project(tmp_path_factory.mktemp("launchers"))


@pytest.fixture(scope="module")
def tiny(tiny_model: Path, dog_dir: Path) -> list[str]:
    return [f"--model_name={tiny_model}", f"--input_dir={dog_dir}", "--device=cpu", "--mixed_precision=bf16"]


def dry_run(project: Path, launcher: str, *arguments: str, **keywords: object) -> list[str]:
    result = launch(project, launcher, "--dry-run", *arguments, **keywords)  # type: ignore[arg-type]
    assert result.returncode == 0, result.stderr
    return shlex.split(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_help(project: Path, launcher: str) -> None:
    result = launch(project, launcher, "--help")
    assert result.returncode == 0
    assert "--max_train_steps=N" in result.stdout


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_each_launcher_would_run_its_own_script_and_defaults(
    project: Path, launcher: str, tiny_model: Path, pokemon_dir: Path, tiny: list[str]
) -> None:
    data = tiny if "deepspeed" not in launcher else [*tiny[:1], f"--dataset_name={pokemon_dir}", *tiny[2:]]
    command = dry_run(project, launcher, *data)
    assert ("train_dreambooth_lora_sd3.py" if "lora" in launcher else "train_dreambooth_sd3.py") in " ".join(command)
    steps, batch, side = {
        "finetune_sd3_dreambooth_deepspeed_bf16.sh": (2000, 4, 1024),
        "finetune_sd3_dreambooth_deepspeed_fp16.sh": (2000, 4, 1024),
        "finetune_sd3_dreambooth_fp16.sh": (400, 1, 1024),
        "finetune_sd3_dreambooth_lora_deepspeed_fp16.sh": (2000, 8, 512),
        "finetune_sd3_dreambooth_lora_fp16.sh": (5000, 8, 512),
    }[launcher]
    assert {f"--max_train_steps={steps}", f"--train_batch_size={batch}", f"--resolution={side}"} <= set(command)
    assert ("--caption_column=text" in command) == ("deepspeed" in launcher)
    assert f"--pretrained_model_name_or_path={tiny_model}" in command
    assert "--validation_epochs=25" in command
    assert not (project / "logs").exists()  # a dry run writes nothing


def test_both_forms_and_what_follows_two_dashes(project: Path, tiny: list[str]) -> None:
    passed = ["--max_grad_norm=8", "--hub_model_id=odd value"]
    command = dry_run(project, DDP, *tiny, "--max_train_steps", "7", "--seed=0", "--", *passed)
    assert "--max_train_steps=7" in command
    assert "--seed=0" in command
    assert command[-2:] == passed


def test_one_number_of_processes_reaches_accelerate(project: Path, tiny: list[str]) -> None:
    assert "--num_processes=2" in dry_run(project, DDP, *tiny, "--num_processors=2")
    assert "--num_processes=1" in dry_run(project, DDP, *tiny)


def test_preset_sets_model_and_settings(project: Path, dog_dir: Path) -> None:
    data = (f"--input_dir={dog_dir}", "--device=cpu", "--preset=sd3.5-large")
    command = dry_run(project, BF16, *data)
    assert "--pretrained_model_name_or_path=stabilityai/stable-diffusion-3.5-large" in command
    assert {"--train_batch_size=8", "--resolution=512", "--gradient_checkpointing"} <= set(command)
    assert "--train_batch_size=2" in dry_run(project, BF16, *data, "--batch_size=2")


def test_paths_are_relative_to_where_the_user_stands(project: Path, tiny: list[str], dog_dir: Path) -> None:
    arguments = [*tiny[:1], f"--input_dir={dog_dir.name}", *tiny[2:]]
    assert f"--instance_data_dir={dog_dir}" in dry_run(project, DDP, *arguments, cwd=dog_dir.parent)


def test_a_dog_folder_brings_its_prompt_to_a_captioned_launcher(project: Path, tiny: list[str]) -> None:
    command = dry_run(project, BF16, *tiny)
    assert "--instance_prompt=A photo of sks dog" in command
    assert not [argument for argument in command if argument.startswith(("--dataset_name", "--caption_column"))]


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--batchsize=4"], 2, "did you mean --batch_size?"),
        (["--max_train_step", "4"], 2, "did you mean --max_train_steps?"),
        (["surplus"], 2, "'surplus' is no option"),
        (["--seed"], 2, "--seed needs a value"),
        (["--preset=sd4"], 2, "--preset=sd4 is not known"),
        (["--device=tpu"], 2, "--device=tpu is not known"),
        (["--engine=other"], 2, "--engine=other is not known"),
        (["--mixed_precision=fp8"], 2, "--mixed_precision=fp8 is not known"),
        (["--mixed_precision=fp16"], 2, "cannot run on a CPU"),
        (["--batch_size=four"], 2, "--batch_size=four is out of range"),
        (["--batch_size=0"], 2, "from 1 to 4096"),
        (["--max_train_steps=-3"], 2, "--max_train_steps=-3"),
        (["--learning_rate=fast"], 2, "--learning_rate=fast"),
        (["--resolution=100"], 2, "the nearest is 96"),
        (["--machine_rank=1"], 2, "--machine_rank=1 is out of range"),
        (["--num_machines=2"], 2, "needs --output_dir"),
        (["--num_processors=0"], 2, "--num_processors=0"),
        (["--dataset_name=some/data"], 2, "exclude each other"),
        (["--input_dir="], 2, "no data was named"),
        (["--config_file=/no/such.yaml"], 2, "--config_file=/no/such.yaml cannot be read"),
        (["--resume=latest", "--output_dir=/no/such/run"], 2, "holds no complete checkpoint"),
        (["--resume=step-3", "--output_dir=/no/such/run"], 2, "--resume=step-3 is not known"),
        (["--model_name=/no/such/model"], 2, "is no directory and no hub name"),
        (["--output_dir=/proc/run"], 2, "--output_dir=/proc/run"),
    ],
)
def test_refusals_name_the_value(
    project: Path, tiny: list[str], arguments: list[str], status: int, said: str
) -> None:
    result = launch(project, DDP, *tiny, *arguments)
    assert result.returncode == status, result.stdout + result.stderr
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert not (project / "logs").exists()
