"""How many tokens T5 reads of a prompt: the same in generation and validation as in training, and what is cut told."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file

from launching import DDP, fake_project, launch
from native_parts import Ranks, loader, options
from painting import SMALL, make_lora
from repository import PROJECT
from sd3.common.command_line import UserError
from sd3.common.pictures import Recipe, pictures_in, read_recipe, save_picture
from sd3.common.trained_length import TrainedLength, find_trained_length
from sd3.evaluation.candidates import Candidate, unequal_settings
from sd3.evaluation.options import Defaults
from sd3.evaluation.options import parse as evaluation_options
from sd3.evaluation.painting import Inference, paint
from sd3.inference.options import parse
from sd3.inference.run import TEXT_TO_IMAGE, generate, make_plan
from sd3.inference.sources import find_sources
from sd3.native.model import Trained
from sd3.native.outputs import write_result
from sd3.native.painting import Painter
from sd3.native.precompute import Precompute

LORA_FILE = "pytorch_lora_weights.safetensors"
CUT_BY_CLIP = "prompts is longer than CLIP's 77 tokens (longest: 92) and is cut there"
EVALUATION = Defaults("clip", "dino", "kid", "object", "sks dog", (8,), "out")
LONG = " ".join(["and"] * 30)  # the tiny tokenizers spell it: 92 tokens of CLIP, 121 of T5
OLD_RECIPE = Recipe(
    prompt="a red dog", negative_prompt="", seed=3, steps=28, guidance_scale=4.5, height=64, width=64, dtype="float32",
    model="m", model_hash="a" * 64,
)  # fmt: skip


# ---- where the length is written


def with_header(lora: Path, **header: str) -> Path:
    """The LoRA with something more in its header."""
    save_file(load_file(lora), lora, {"format": "pt", **header})
    return lora


def length_of(model: object, lora: object = "") -> tuple[int, Path] | None:
    return find_trained_length(find_sources(str(model), str(lora)).length_records)


@pytest.fixture(scope="module")
def lora(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_lora(tiny_model, tmp_path_factory.mktemp("lora"))


def test_a_model_without_a_record_states_none(tiny_model: Path, lora: Path) -> None:
    assert length_of(tiny_model) is None
    assert length_of(tiny_model, lora) is None


def test_a_lora_states_it_in_its_header(tiny_model: Path, lora: Path, tmp_path: Path) -> None:
    file = with_header(Path(shutil.copy(lora, tmp_path)), max_sequence_length="120")
    assert length_of(tiny_model, file) == (120, file)
    assert length_of(tiny_model, tmp_path) == (120, file)


def test_a_run_states_it_in_its_settings_for_its_checkpoints_too(tiny_model: Path, lora: Path, tmp_path: Path) -> None:
    settings = tmp_path / "run" / "run_settings.json"
    (tmp_path / "run" / "checkpoint-4").mkdir(parents=True)
    settings.write_text(json.dumps({"model_name": str(tiny_model), "max_sequence_length": "90"}))
    for folder in (settings.parent, settings.parent / "checkpoint-4"):
        shutil.copy(lora, folder)
        assert length_of(folder) == length_of(tiny_model, folder) == (90, settings)
    with_header(settings.parent / LORA_FILE, max_sequence_length="80")  # what is in the file itself comes first
    assert length_of(settings.parent) == (80, settings.parent / LORA_FILE)


def test_a_full_fine_tune_states_it_wherever_its_engine_writes(tiny_model: Path, lora: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(tiny_model, tmp_path / "run"))
    settings, index = run / "run_settings.json", run / "model_index.json"
    settings.write_text(json.dumps({"model_name": "elsewhere", "max_sequence_length": "300"}))
    assert length_of(run) == (300, settings)
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_max_sequence_length": 100}))
    assert length_of(run) == length_of(run, lora) == (100, index)  # also with a LoRA that states none
    checkpoint = run / "checkpoint-2"
    shutil.copytree(tiny_model / "transformer", checkpoint / "transformer")
    settings.write_text(json.dumps({"model_name": str(tiny_model), "max_sequence_length": "300"}))
    assert length_of(checkpoint) == (300, settings)


@pytest.mark.parametrize("stated", ["abc", "0", "513", "-1", "7.5", ""])
def test_a_record_that_is_no_length_is_refused_unless_one_is_given(
    tiny_model: Path, lora: Path, tmp_path: Path, stated: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = with_header(Path(shutil.copy(lora, tmp_path)), max_sequence_length=stated)
    flags = [f"--model={tiny_model}", f"--lora={file}", *SMALL, "--prompt=a", "--seeds=1", f"--output-dir={tmp_path}"]
    assert generate(flags) == 2
    assert f"{file} says max_sequence_length={stated}, and expected is a whole number from 1" in capsys.readouterr().err
    assert generate([*flags, "--max-sequence-length=77"]) == 0


def test_files_that_are_no_records_are_passed_over(tmp_path: Path) -> None:
    for name, content in (("a.safetensors", "junk"), ("model_index.json", "{"), ("run_settings.json", "[]")):
        (tmp_path / name).write_text(content)
    assert find_trained_length([*sorted(tmp_path.iterdir()), tmp_path / "gone"]) is None


@pytest.mark.parametrize(("kind", "length"), [("lora", 130), ("full", 130), ("lora", 77)])
def test_the_native_engine_writes_what_generation_finds(
    tiny_model: Path, tmp_path: Path, kind: str, length: int
) -> None:
    given = options(f"--max_sequence_length={length}", kind=kind)
    write_result(Trained(given, kind, tiny_model, torch.float32), tiny_model, tmp_path, torch.float32)
    file = tmp_path / (LORA_FILE if kind == "lora" else "model_index.json")
    found = length_of(tiny_model, tmp_path) if kind == "lora" else length_of(tmp_path)
    assert found == TrainedLength(length, file)
    if kind == "lora":
        pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_model)
        pipeline.load_lora_weights(tmp_path, weight_name=LORA_FILE)
    else:
        StableDiffusion3Pipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("passed", "length"),
    [
        ([], "77"), (["--rank=4"], "77"), (["--max_sequence_length=256"], "256"),
        (["--max_sequence_length", "99", "--rank", "4"], "99"), (["--max_seq=128", "--max_train=3"], "128"),
        (["--max_sequence_length=99", "--max_sequence_length=100"], "100"), (["--max", "3"], "77"),
    ],
)  # fmt: skip
def test_launchers_read_the_length_as_the_training_script_will(passed: list[str], length: str) -> None:
    code = 'LAUNCHER=x; . sd3/launch/launch.sh; PYTHON="$1"; shift; PASSED_ON=("$@"); passed_length'
    done = subprocess.run(
        ["bash", "-euc", code, "bash", sys.executable, *passed], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{length}\n"


@pytest.mark.parametrize("engine", ["diffusers", "native"])
def test_launchers_keep_the_length_of_both_engines(
    tiny_model: Path, dog_dir: Path, tmp_path: Path, engine: str
) -> None:
    result = launch(
        fake_project(tmp_path), DDP, f"--model_name={tiny_model}", f"--input_dir={dog_dir}", "--device=cpu",
        "--mixed_precision=bf16", f"--output_dir={tmp_path / 'run'}", f"--engine={engine}", "--",
        "--max_sequence_length=99",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    settings = (tmp_path / "run" / "run_settings.json").read_text()
    seen = json.loads((tmp_path / "run" / "stub-0.json").read_text())
    assert seen["environment"]["SD3_CUTS_PRINTED"] == "1"
    assert f'  "engine": "{engine}",\n' in settings and '  "max_sequence_length": "99",\n' in settings


# ---- generation


class Generated(NamedTuple):
    """An image, and what was printed while it was made."""

    recipe: Recipe
    pixels: bytes
    said: str


@pytest.fixture
def made(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Generated]:
    """Generates one image."""

    def make(*flags: str, model: Path = tiny_model) -> Generated:
        output = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
        prompt = [] if any(flag.startswith(("--like", "--prompt")) for flag in flags) else ["--prompt=a red dog"]
        source = [] if any(flag.startswith("--like") for flag in flags) else [f"--model={model}", *SMALL, "--seeds=1"]
        assert generate([*source, *prompt, "--device=cpu", *flags, f"--output-dir={output}"]) == 0
        ((path, recipe),) = pictures_in(output)
        with Image.open(path) as image:
            return Generated(recipe, image.tobytes(), "".join(capsys.readouterr()))

    return make


def test_generation_reads_as_many_tokens_as_the_training(
    tiny_model: Path, lora: Path, tmp_path: Path, made: Callable
) -> None:
    file = with_header(Path(shutil.copy(lora, tmp_path)), max_sequence_length="77")
    usual, wide, said = made(f"--lora={lora}")
    assert usual.max_sequence_length == 256 and "T5 reads" not in said
    trained, narrow, said = made(f"--lora={file}")
    assert trained.max_sequence_length == 77
    assert f"T5 reads 77 tokens of a prompt, as in training ({file}); --max-sequence-length changes that." in said
    asked, again, said = made(f"--lora={file}", "--max-sequence-length=256")
    assert asked.max_sequence_length == 256 and again == wide != narrow
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_model)
    pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
    image = pipeline(
        "a red dog", num_inference_steps=4, guidance_scale=1.0, height=64, width=64, max_sequence_length=77,
        generator=torch.Generator("cpu").manual_seed(1),
    ).images[0]  # fmt: skip
    levels = np.abs(np.asarray(image).astype(int) - np.frombuffer(narrow, np.uint8).reshape(64, 64, 3))
    assert levels.max() <= 1


def test_like_keeps_the_length(made: Callable, tmp_path: Path) -> None:
    first, pixels, said = made("--max-sequence-length=100")
    assert "T5 reads 100 tokens of a prompt, as asked for." in said
    (path, _) = next(pair for pair in pictures_in(tmp_path / "out0"))
    assert made(f"--like={path}")[:2] == (first, pixels)
    changed, other, _ = made(f"--like={path}", "--max-sequence-length=500")
    assert changed.max_sequence_length == 500 and other != pixels


@pytest.mark.parametrize("value", ["76", "513", "many", "", "-77", "77.5"])
def test_a_length_out_of_range_is_refused(value: str) -> None:
    with pytest.raises(UserError, match="--max-sequence-length=.*is out of range; give a whole number from 77 to 512"):
        parse([f"--max-sequence-length={value}"], TEXT_TO_IMAGE)


def test_images_made_before_lengths_were_kept_are_found(tmp_path: Path) -> None:
    """Name and digest as they were, the length 256 where a file says none."""
    assert OLD_RECIPE.digest() == "c9209013a331812135e1bb4710aa2dd71411f2ae77add184e6c9cde2d12a3497"
    assert OLD_RECIPE.file_name() == "a-red-dog-3-c9209013a3.png"
    assert dataclasses.replace(OLD_RECIPE, max_sequence_length=77).digest() != OLD_RECIPE.digest()
    save_picture(Image.new("RGB", (64, 64)), tmp_path / "new.png", OLD_RECIPE, {})
    chunks = PngImagePlugin.PngInfo()
    with Image.open(tmp_path / "new.png") as image:
        for key, value in image.info.items():
            if key != "max_sequence_length":
                chunks.add_itxt(key, value)
        image.save(tmp_path / "old.png", pnginfo=chunks)
    assert read_recipe(tmp_path / "old.png") == OLD_RECIPE
    assert parse([f"--like={tmp_path / 'old.png'}"], TEXT_TO_IMAGE).max_sequence_length == 256


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--prompt=a dog"], ""),
        (
            ["--prompt=a dog", f"--prompt={LONG}"],
            f"note: 1 of 2 {CUT_BY_CLIP}; T5's 256 hold them all.",
        ),
        (
            [f"--prompt={LONG}", "--max-sequence-length=77"],
            f"note: 1 of 1 {CUT_BY_CLIP}; 1 is longer than T5's 77 tokens (longest: 121) and is cut there.",
        ),
        (["--prompt=a dog", f"--negative-prompt={LONG}"], ""),  # which counts for nothing without guidance
        (
            ["--prompt=a dog", f"--negative-prompt={LONG}", "--guidance-scale=3"],
            f"note: 1 of 2 {CUT_BY_CLIP}; T5's 256 hold them all.",
        ),
    ],
)
def test_prompts_that_are_cut_are_told(tiny_model: Path, tmp_path: Path, flags: list[str], sentence: str) -> None:
    given = parse([f"--model={tiny_model}", *SMALL, "--seeds", "1", "2", *flags], TEXT_TO_IMAGE)
    given.output_dir = tmp_path
    make_plan(given, "float32")
    assert [note for note in given.notes if "longer than" in note] == ([sentence] if sentence else [])


def test_a_cut_is_printed_once(made: Callable) -> None:
    _, _, said = made(f"--prompt={LONG}")
    assert said.count(f"1 of 1 {CUT_BY_CLIP}") == 1


# ---- evaluation


def test_candidates_are_generated_with_their_lengths_and_cuts_are_told_once(
    tiny_model: Path, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = with_header(Path(shutil.copy(lora, tmp_path)), max_sequence_length="77")
    candidates = (Candidate("base", model=str(tiny_model)), Candidate("tuned", None, str(tiny_model), str(trained)))
    inference, flags = Inference(), [flag for flag in SMALL if "steps" not in flag]

    def lengths(*more: str) -> list[int]:
        sets = [
            paint(candidate, [LONG, "a dog"], [1], "float32", [*flags, "--steps=1", *more], tmp_path / "out", inference)
            for candidate in candidates
        ]
        assert [note for note in unequal_settings(sets) if "max sequence length" in note] == (
            [] if more else
            ["The candidates were painted with different max sequence length (base: 256; tuned: 77)."]
        )  # fmt: skip
        return [recipe.max_sequence_length for one in sets for recipe in one.recipes]

    assert lengths() == [256, 256, 77, 77]
    assert lengths("--max-sequence-length=99") == [99] * 4
    said = capsys.readouterr().err
    assert said.count("T5's 256 hold them all") == 1
    assert said.count("T5 reads 77 tokens of a prompt, as in training") == 1
    assert said.count("than T5's 99 tokens") == 1  # for two candidates
    assert [note for note in inference.notes if "longer than" in note]


def test_the_evaluation_passes_its_flag_on(tiny_model: Path) -> None:
    given = evaluation_options(["--candidate=label=a,model=m", "--max-sequence-length=99"], EVALUATION)
    assert given.painting_flags == ["--max-sequence-length=99"]
    with pytest.raises(UserError, match="--max-sequence-length is for pictures that are painted here"):
        evaluation_options(["--pictures", "p", "--max-sequence-length=99"], EVALUATION)


# ---- training


@pytest.mark.parametrize("more", [(), ("--train_text_encoder",)])
def test_captions_that_are_cut_are_logged_once_with_and_without_text_encoders(
    more: tuple[str, ...], tiny_model: Path, dog_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = [f"--instance_data_dir={dog_dir}", "--resolution=32", f"--precompute_dir={tmp_path}", *more]
    with caplog.at_level(logging.WARNING):
        loader(options(*given, f"--instance_prompt={LONG}", "--max_sequence_length=100"), tiny_model)
    assert [record.message for record in caplog.records if "longer than" in record.message] == [
        f"1 of 1 {CUT_BY_CLIP.replace('prompts', 'captions')}; 1 is longer than T5's 100 tokens (longest: 121) and is "
        "cut there."
    ]
    caplog.clear()
    monkeypatch.setenv("SD3_CUTS_PRINTED", "1")  # by a launcher's summary of the data
    loader(options(*given, f"--instance_prompt={LONG}"), tiny_model)
    monkeypatch.delenv("SD3_CUTS_PRINTED")
    loader(options(*given, f"--instance_prompt={LONG}"), tiny_model, Ranks(1, 2))  # another rank than the first
    loader(options(*given, "--instance_prompt=a dog"), tiny_model)
    assert "longer than" not in caplog.text


@pytest.mark.parametrize("trains_encoders", [False, True])
@pytest.mark.parametrize("length", [77, 300])
def test_validation_reads_as_many_tokens_as_the_training(
    trains_encoders: bool, length: int, tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Images of the pipeline with the prompt padded to the training's length, as many of 28 steps as one takes."""
    flags = ["--train_text_encoder"] if trains_encoders else []
    given = options(
        "--validation_prompt=a red dog", "--num_validation_images=1", "--seed=5", f"--max_sequence_length={length}",
        f"--precompute_dir={tmp_path}", *flags,
    )  # fmt: skip
    ranks = Ranks()
    ranks.trackers = []
    painter = Painter(given, ranks, Precompute(given, tiny_model, ranks), torch.float32)
    trained = Trained(given, "lora", tiny_model, torch.float32)
    (image,) = painter.paint(trained, 0)

    def expected(tokens: int) -> np.ndarray:
        pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_model)
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(5)
        return np.asarray(pipeline("a red dog", generator=generator, max_sequence_length=tokens).images[0]).astype(int)

    assert np.abs(np.asarray(image) - expected(length)).max() <= 1
    assert np.abs(np.asarray(image) - expected(256)).max() > 1
