"""The tiny model and the synthetic data are what the launchers take, and the same for the same seed."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from sd3.common.synthetic_data import make_dog, make_pokemon
from sd3.common.tiny_sd3 import make_tiny_sd3


def digest(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def test_the_tiny_model_loads_as_the_real_pipeline_and_paints(tiny_model: Path) -> None:
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_model)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a dog", num_inference_steps=1, height=64, width=64).images[0].size == (64, 64)
    widths = {pipeline.text_encoder.config.hidden_size, pipeline.text_encoder_2.config.hidden_size}
    assert len(widths) == 2
    assert not widths & {768, 1280}
    text = "A photo of sks dog, in a bucket!"
    assert pipeline.tokenizer_3.decode(pipeline.tokenizer_3(text).input_ids, skip_special_tokens=True) == text
    assert pipeline.tokenizer.decode(pipeline.tokenizer(text).input_ids, skip_special_tokens=True).replace(
        " ", ""
    ) == text.lower().replace(" ", "")


def test_the_seed_decides_the_weights(tmp_path: Path, tiny_model: Path) -> None:
    make_tiny_sd3(tmp_path / "same", seed=0)
    make_tiny_sd3(tmp_path / "other", seed=1)
    assert digest(tmp_path / "same") == digest(tiny_model)
    assert digest(tmp_path / "other") != digest(tiny_model)


def test_the_dog_folder_holds_pictures_alone(tmp_path: Path, dog_dir: Path) -> None:
    files = sorted(dog_dir.iterdir())
    assert len(files) == 5
    assert len({Image.open(file).convert("RGB").tobytes() for file in files}) == 5
    make_dog(tmp_path / "again")
    assert digest(tmp_path / "again") == digest(dog_dir)


def test_the_captioned_data_set_loads_as_the_published_one_does(tmp_path: Path, pokemon_dir: Path) -> None:
    import datasets

    rows = datasets.load_dataset(str(pokemon_dir), cache_dir=str(tmp_path / "cache"))["train"]
    assert len(rows) == 8
    assert rows[0]["image"].size == (96, 96)
    assert len(set(rows["text"])) > 1


@pytest.mark.parametrize("maker", [make_tiny_sd3, make_dog, make_pokemon])
def test_nothing_is_overwritten(tmp_path: Path, maker) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="not an empty directory"):
        maker(tmp_path / "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_bad_size_is_refused_in_one_line(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "sd3.common.synthetic_data", "--kind=dog", f"--output={tmp_path / 'x'}", "--images=0"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 2
    assert "0" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "x").exists()
