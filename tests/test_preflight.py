"""Everything that is refused before a run, by its message; and that a good run is let pass."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest

from sd3.common.command_line import UserError
from sd3.common.model_files import check_model
from sd3.launch import preflight
from sd3.launch.preflight import checkpoint_bytes


@pytest.fixture
def model(tmp_path: Path, tiny_model: Path) -> Path:
    """A copy of the model, free to be spoilt."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def only(problems: list[str]) -> str:
    assert len(problems) == 1, problems
    return problems[0]


def settings_of(model: Path, run_dir: Path, **other: str) -> dict[str, str]:
    return {
        "model_name": str(model), "run_dir": str(run_dir), "script": "train_dreambooth_lora_sd3", "machine_rank": "0",
        "num_processors": "2", "num_machines": "1", "main_process_port": "0", "engine": "native", "device": "cpu",
        **other,
    }  # fmt: skip


def flags_of(*data: str) -> list[str]:
    return ["--pretrained_model_name_or_path=m", "--instance_prompt=a dog", "--resolution=64", *data]


def test_a_good_run_passes(tiny_model: Path, dog_dir: Path, pokemon_dir: Path, tmp_path: Path) -> None:
    settings = settings_of(tiny_model, tmp_path / "new" / "run")
    problems, summary = preflight.check(settings, flags_of(f"--instance_data_dir={dog_dir}"))
    assert problems == []
    assert summary.lines()[0] == "5 images, 1 caption"
    problems, summary = preflight.check(
        settings, flags_of(f"--dataset_name={pokemon_dir}", "--caption_column=text", f"--cache_dir={tmp_path}")
    )
    assert problems == []
    assert summary.lines()[0] == "8 images, 8 distinct captions"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--mixed_precision=fp16"], "--mixed_precision=fp16 cannot run on a CPU"),
        (["--image_column=jpg", "--dataset_name={pokemon}"], "--image_column=jpg is not a column of"),
        (["--rank=0"], "--rank=0 is out of range"),
        (["--rank=100000"], "--rank=100000 is out of range"),
        (["--logging_dir=/var/log"], "--logging_dir=/var/log is outside --output_dir"),
        (["--logging_dir=../logs"], "--logging_dir=../logs is outside --output_dir"),
        (["--report_to=clearml"], "--report_to=clearml needs clearml"),
        (["--optimizer=prodigy"], "--optimizer=prodigy needs prodigyopt"),
        (["--use_8bit_adam"], "--use_8bit_adam needs bitsandbytes"),
        (["--no_such_flag"], "unrecognized arguments: --no_such_flag"),
        (["--max_sequence_length=0"], "--max_sequence_length=0 is out of range"),
        (["--with_prior_preservation"], "--with_prior_preservation needs --class_data_dir"),
    ],
)
def test_flags_after_the_dashes_are_checked(
    tiny_model: Path, dog_dir: Path, pokemon_dir: Path, tmp_path: Path, flags: list[str], said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("sd3.native.options.importlib.util.find_spec", lambda name: None)
    given = [flag.format(pokemon=pokemon_dir) for flag in flags]
    data = [] if any(flag.startswith("--dataset_name") for flag in given) else [f"--instance_data_dir={dog_dir}"]
    with_no_tracker = [] if "--report_to=clearml" in given else ["--report_to=all"]
    try:
        problems, _ = preflight.check(settings_of(tiny_model, tmp_path), flags_of(*data, *with_no_tracker, *given))
    except UserError as error:
        problems = [str(error)]
    assert said in only(problems)


def test_a_flag_of_the_native_engine_is_refused_for_the_scripts(
    tiny_model: Path, dog_dir: Path, tmp_path: Path
) -> None:
    flags = flags_of(f"--instance_data_dir={dog_dir}", "--keep_every=3")
    settings = settings_of(tiny_model, tmp_path, engine="diffusers")
    assert "--keep_every is an option of the native engine only" in only(preflight.check(settings, flags)[0])


@pytest.mark.parametrize(("engine", "problems"), [("native", 0), ("diffusers", 1)])
def test_other_files_of_the_class_folder(
    tiny_model: Path, dog_dir: Path, tmp_path: Path, engine: str, problems: int
) -> None:
    classes = Path(shutil.copytree(dog_dir, tmp_path / "class"))
    (classes / ".DS_Store").write_bytes(b"x")
    (classes / "Thumbs.db").write_bytes(b"x")
    flags = ["--with_prior_preservation", f"--class_data_dir={classes}", "--class_prompt=a dog"]
    settings = settings_of(tiny_model, tmp_path, engine=engine)
    found, summary = preflight.check(settings, flags_of(f"--instance_data_dir={dog_dir}", *flags))
    assert len(found) == problems
    if found:
        assert "(.DS_Store, Thumbs.db)" in found[0]
    else:
        assert "class images: 2 left out, not named as an image file (.DS_Store, Thumbs.db)" in summary.lines()


def test_a_damaged_class_image_is_named(tiny_model: Path, dog_dir: Path, tmp_path: Path) -> None:
    classes = tmp_path / "class"
    classes.mkdir()
    (classes / "cut.png").write_bytes(b"no image")
    flags = ["--with_prior_preservation", f"--class_data_dir={classes}", "--class_prompt=a dog"]
    problems, _ = preflight.check(settings_of(tiny_model, tmp_path), flags_of(f"--instance_data_dir={dog_dir}", *flags))
    assert f"--class_data_dir={classes}: cut.png cannot be read as an image" in only(problems)


def test_a_hub_data_set_is_not_downloaded_for_a_dry_run(tiny_model: Path, tmp_path: Path) -> None:
    settings = settings_of(tiny_model, tmp_path, dry_run="1")
    assert preflight.check(settings, flags_of("--dataset_name=somebody/pictures")) == ([], None)


@pytest.mark.parametrize(
    "part",
    ["model_index.json", "vae/config.json", "tokenizer_3/tokenizer_config.json", "scheduler/scheduler_config.json"],
)
def test_a_missing_part_is_named(model: Path, part: str) -> None:
    (model / part).unlink()
    assert f"is incomplete: {part} missing" in only(check_model(str(model)))


def test_all_missing_parts_are_named_at_once(model: Path) -> None:
    shutil.rmtree(model / "text_encoder_3")
    next((model / "transformer").glob("*.safetensors")).unlink()
    problem = only(check_model(str(model)))
    assert "transformer/*.safetensors" in problem
    assert "text_encoder_3/config.json" in problem


def test_a_missing_shard_is_named(model: Path) -> None:
    index = {"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}
    whole = next((model / "transformer").glob("*.safetensors"))
    (model / "transformer" / f"{whole.name}.index.json").write_text(json.dumps(index))
    shutil.copy(whole, model / "transformer" / "part-1.safetensors")
    assert check_model(str(model)) == []  # beside whole weights it does not matter
    whole.unlink()
    assert "transformer/part-2.safetensors missing" in only(check_model(str(model)))


@pytest.mark.parametrize("spoil", [lambda data: data[:-10], lambda data: b"a git-lfs pointer, not weights"])
def test_damaged_weights_are_named(model: Path, spoil) -> None:
    weights = next((model / "vae").glob("*.safetensors"))
    weights.write_bytes(spoil(weights.read_bytes()))
    assert f"is damaged: vae/{weights.name}" in only(check_model(str(model)))


def test_a_hub_name_passes_and_a_wrong_path_does_not() -> None:
    assert check_model("stabilityai/stable-diffusion-3.5-large") == []
    assert "no directory and no hub name" in only(check_model("./no/such/model"))


def test_a_checkpoint_is_estimated_from_the_number_of_parameters(tiny_model: Path) -> None:
    from diffusers import SD3Transformer2DModel

    transformer = SD3Transformer2DModel.from_pretrained(tiny_model, subfolder="transformer")
    parameters = sum(parameter.numel() for parameter in transformer.parameters())
    buffers = sum(buffer.numel() for buffer in transformer.buffers())
    model = sum(file.stat().st_size for file in tiny_model.rglob("*") if file.is_file())
    estimate = checkpoint_bytes(str(tiny_model), lora=False)
    assert 12 * parameters + model <= estimate <= 12 * (parameters + buffers) + model


def test_too_little_disk_is_refused_with_both_numbers(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 2**20))
    settings = {"run_dir": str(tmp_path), "model_name": str(tiny_model), "script": "train_dreambooth_sd3"}
    problem = only(preflight.check_output(settings))
    assert "0.0 GiB are free" in problem
    assert "another disk" in problem


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as busy:
        busy.bind(("", 0))
        busy.listen()
        port = str(busy.getsockname()[1])
        settings = {"machine_rank": "0", "num_processors": "2", "num_machines": "1", "main_process_port": port}
        assert f"--main_process_port={port} cannot be used" in only(preflight.check_port(settings))
        assert preflight.check_port({**settings, "machine_rank": "1", "num_machines": "2"}) == []


def test_flags_that_do_nothing_are_noted_for_the_scripts_too(
    tiny_model: Path, dog_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = flags_of(f"--instance_data_dir={dog_dir}", "--image_column=jpg", "--dataset_split=test")
    for engine, expected in (("diffusers", 2), ("native", 0)):
        assert preflight.check(settings_of(tiny_model, tmp_path, engine=engine), flags)[0] == []
        noted = capsys.readouterr().err.splitlines()
        assert len([line for line in noted if "does nothing without --dataset_name" in line]) == expected
