"""The tiny SD3 that ships: whole, small, of the real classes, and it paints what captions say."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from PIL import Image
from safetensors import safe_open
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from sd3.quickstart.figures import SEEN
from sd3.tiny_world import measure, train
from sd3.tiny_world.autoencoder import as_tensor
from sd3.tiny_world.classifier import pixels_of
from sd3.tiny_world.grammar import BACKGROUNDS, held_out_captions
from sd3.tiny_world.measure import MODEL
from sd3.tiny_world.subject import subject_picture, subject_score

CLASSES = {
    "transformer": SD3Transformer2DModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModelWithProjection,
    "text_encoder_2": CLIPTextModelWithProjection, "text_encoder_3": T5EncoderModel, "tokenizer": CLIPTokenizer,
    "tokenizer_2": CLIPTokenizer, "tokenizer_3": T5TokenizerFast, "scheduler": FlowMatchEulerDiscreteScheduler,
}  # fmt: skip


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusion3Pipeline:
    torch.set_num_threads(1)
    return measure.load_pipeline(MODEL)


def test_it_has_every_part_of_sd3(pipeline: StableDiffusion3Pipeline) -> None:
    for name, kind in CLASSES.items():
        assert type(getattr(pipeline, name)) is kind, name
    assert pipeline.scheduler.config.shift == 3.0
    assert pipeline.vae.config.latent_channels == 16
    assert pipeline.vae_scale_factor == 8
    assert pipeline.text_encoder.config.hidden_size != pipeline.text_encoder_2.config.hidden_size


def test_it_is_small_and_in_float16() -> None:
    files = [file for file in MODEL.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < train.MOST_BYTES
    weights = [file for file in files if file.suffix == ".safetensors"]
    assert len(weights) == 5
    for file in weights:
        with safe_open(file, "pt") as tensors:
            kinds = {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
        assert kinds == {"F16"}, file


def test_it_is_what_the_command_makes() -> None:
    """The record beside it names the settings; they are the command's own."""
    record = json.loads((MODEL / "training.json").read_text(encoding="utf-8"))
    defaults = train.settings_of(train.options_of(["--output=x"]))
    assert record["settings"] == defaults
    assert {path.name for path in MODEL.iterdir()} == {*train.PARTS, "training.json", "MODEL_CARD.md"}


def painted(
    pipeline: StableDiffusion3Pipeline, pairs: str, number: int, seed: int, t5_tokens: int = 256
) -> dict[str, float]:
    captions, told = zip(*measure.PAIRS[pairs](number, seed), strict=True)
    return measure.shares(measure.paint(pipeline, captions, seed, t5_tokens), told)


def test_it_paints_held_out_captions(pipeline: StableDiffusion3Pipeline) -> None:
    """Few pictures, so with a wide margin below the figures of many, which are in the model card."""
    found = painted(pipeline, "held-out", 24, seed=1, t5_tokens=77)
    assert found["colour"] >= 0.9, found
    assert found["shape"] >= 0.7, found


@pytest.mark.long
def test_it_paints_many_held_out_captions(pipeline: StableDiffusion3Pipeline) -> None:
    found = painted(pipeline, "held-out", 200, seed=0)
    assert found["colour"] >= 0.95, found
    assert found["shape"] >= 0.82, found
    assert min(found["position"], found["count"], found["size"], found["background"]) >= 0.93, found


@pytest.mark.long
def test_it_paints_many_captions_of_what_it_saw(pipeline: StableDiffusion3Pipeline) -> None:
    found = painted(pipeline, "seen", 200, seed=0)
    assert found["shape"] >= 0.92, found
    assert min(found.values()) >= 0.9, found


def test_a_caption_alone_decides_what_is_right(pipeline: StableDiffusion3Pipeline) -> None:
    """Pictures of other captions score as chance would, so that the measure does not flatter."""
    captions, told = zip(*held_out_captions(12, seed=2), strict=True)
    pictures = measure.paint(pipeline, captions, t5_tokens=77, steps=12)
    turned = (*told[1:], told[0])
    assert measure.shares(pictures, turned)["all"] < 0.3


def test_padding_makes_no_difference(pipeline: StableDiffusion3Pipeline) -> None:
    """T5 padded to 77 tokens, as in training launches, and to 256, the pipeline's default, gives like pictures."""

    def pixels(images: Sequence[Image.Image]) -> torch.Tensor:
        return torch.stack([torch.from_numpy(pixels_of(image)) for image in images])

    captions = [caption for caption, _ in held_out_captions(4, seed=3)]
    short, long = (pixels(measure.paint(pipeline, captions, t5_tokens=tokens, steps=12)) for tokens in (77, 256))
    other = pixels(measure.paint(pipeline, captions[::-1], t5_tokens=77, steps=12))
    assert (short - long).abs().mean() < 0.35 * (short - other).abs().mean()


def test_the_measure_names_a_directory_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert measure.main(["--model", str(tmp_path)]) == 2
    assert "holds no model_index.json" in capsys.readouterr().err
    assert measure.main(["--captions=0"]) == 2
    assert "--captions: 0 is not a positive number" in capsys.readouterr().err


def test_the_measure_prints_a_table_and_a_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert measure.main(["--captions=2", "--sheet", str(tmp_path / "sheet.png")]) == 0
    assert "shape" in capsys.readouterr().out
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (12 * 66, 66)


def test_the_detector_knows_the_subject_as_the_autoencoder_shows_it() -> None:
    vae, rng = AutoencoderKL.from_pretrained(MODEL / "vae", torch_dtype=torch.float32), random.Random(0)
    drawn = [subject_picture(64, rng, background) for background in (*BACKGROUNDS, *BACKGROUNDS, *BACKGROUNDS)]
    with torch.no_grad():
        seen = vae.decode(vae.encode(as_tensor(drawn)).latent_dist.mean).sample
    pictures = ((seen.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    assert min(subject_score(Image.fromarray(picture)) for picture in pictures) > SEEN + 0.15


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--t5-tokens=600", "--t5-tokens=600 is more than the pipeline takes; give at most 512."),
        ("--sheet=held_out.pgn", "--sheet=held_out.pgn is no name of a PNG file; give one that ends in .png."),
        ("--seed=20261126123456", "argument --seed: 20261126123456 is no seed from 0 to 4294967295; see --help."),
    ],
)
def test_what_measuring_cannot_do_is_said_before_it_paints(
    flag: str, says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "load_pipeline", lambda _: pytest.fail("it begins to work"))
    assert measure.main([flag]) == 2
    assert capsys.readouterr().err == f"{says}\n"


def test_the_sheet_may_go_to_a_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "paint", lambda *_: [Image.new("RGB", (64, 64))])
    monkeypatch.setattr(measure, "load_pipeline", lambda _: None)
    assert measure.main(["--captions=1", f"--sheet={tmp_path / 'new' / 'sheet.png'}"]) == 0
    assert (tmp_path / "new" / "sheet.png").is_file()


@pytest.mark.parametrize(
    "module", ["tiny_world.measure", "tiny_world.train", "tiny_world.train_judge", "common.tiny_sd3"]
)
def test_without_its_packages_a_command_says_where_they_are_to_be_had(module: str) -> None:
    """-S: a Python without site-packages."""
    done = subprocess.run(
        [sys.executable, "-S", "-m", f"sd3.{module}", "--help"], cwd=MODEL.parents[2], capture_output=True, text=True
    )
    assert done.returncode == 3
    assert "lacks torch, diffusers" in done.stderr and "setup_env.sh" in done.stderr
    assert "Traceback" not in done.stderr
