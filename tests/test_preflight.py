"""Everything that is refused before a run, by its message; and that a good run is let pass."""

from __future__ import annotations

import io
import json
import shutil
import socket
from pathlib import Path

import pytest
from PIL import Image

from sd3.common import preflight
from sd3.common.model_files import check_model
from sd3.common.preflight import checkpoint_bytes
from sd3.common.preflight_data import check_dataset, check_folder


@pytest.fixture
def model(tmp_path: Path, tiny_model: Path) -> Path:
    """A copy of the model, free to be spoilt."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def dogs(tmp_path: Path, dog_dir: Path) -> Path:
    return Path(shutil.copytree(dog_dir, tmp_path / "dogs"))


def only(problems: list[str]) -> str:
    assert len(problems) == 1, problems
    return problems[0]


def test_a_good_run_passes(tiny_model: Path, dog_dir: Path, pokemon_dir: Path, tmp_path: Path) -> None:
    settings = {
        "model_name": str(tiny_model), "input_dir": str(dog_dir), "dataset_name": "", "caption_column": "",
        "run_dir": str(tmp_path / "new" / "run"), "script": "train_dreambooth_sd3", "machine_rank": "0",
        "num_processors": "2", "num_machines": "1", "main_process_port": "0",
    }  # fmt: skip
    assert preflight.check(settings) == []
    assert check_dataset(str(pokemon_dir), "text") == []


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
    (model / "transformer" / "x.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(next((model / "transformer").glob("*.safetensors")), model / "transformer" / "part-1.safetensors")
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


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / "notes.txt").write_text("a dog"), "notes.txt cannot be read as an image"),
        (lambda folder: (folder / "more").mkdir(), "holds folders (more)"),
        (lambda folder: (folder / "cut.png").write_bytes(next(folder.glob("*.png")).read_bytes()[:200]), "cut.png"),
        (lambda folder: Image.new("1", (20_000, 20_000)).save(folder / "huge.png"), "more than 100 million"),
        (lambda folder: [file.unlink() for file in folder.iterdir()], "is empty"),
    ],
)
def test_folders_that_cannot_be_trained_on(dogs: Path, spoil, said: str) -> None:
    spoil(dogs)
    assert said in only(check_folder(str(dogs)))


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert "is no directory" in only(check_folder(str(tmp_path / "none")))


def test_a_missing_caption_column_lists_those_there_are(pokemon_dir: Path) -> None:
    problem = only(check_dataset(str(pokemon_dir), "caption"))
    assert "--caption_column=caption is no column" in problem
    assert "image, text" in problem


def test_parquet_that_cannot_be_read_and_data_that_is_none(tmp_path: Path, dog_dir: Path) -> None:
    assert f"use --input_dir={dog_dir}" in only(check_dataset(str(dog_dir), "text"))
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    assert "cannot be read as parquet" in only(check_dataset(str(tmp_path), "text"))


def parquet_of(folder: Path, rows: list[dict]) -> str:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet")
    return str(folder)


def row(content: bytes | None = None, text: str | None = "t") -> dict:
    stream = io.BytesIO()
    Image.effect_noise((32, 32), 50).save(stream, format="PNG")
    return {"image": {"bytes": content or stream.getvalue(), "path": None}, "text": text}


CUT_SHORT = row()["image"]["bytes"][:200]


@pytest.mark.parametrize(
    ("spoiled", "said"),
    [
        (row(b"broken"), "row 99 has an image that cannot be read"),
        (row(CUT_SHORT), "row 99 has an image that cannot be read"),
        (row(text=None), "row 99 has no text in the column text"),
        ({"image": None, "text": "t"}, "row 99 has no image"),
    ],
    ids=["broken", "cut short", "no text", "no image"],
)
def test_a_row_that_cannot_be_trained_on_is_named_wherever_it_stands(tmp_path: Path, spoiled: dict, said: str) -> None:
    rows = [*(row() for _ in range(99)), spoiled]
    assert said in only(check_dataset(parquet_of(tmp_path, rows), "text"))


def test_of_very_many_pictures_the_later_ones_are_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sd3.common.preflight_data.DECODED", 1)
    assert "row 0" in only(check_dataset(parquet_of(tmp_path, [row(CUT_SHORT), row(CUT_SHORT)]), "text"))
