"""DreamBooth works: the tiny SD3 is taught a subject that it has never seen, through the launchers, by both engines."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from launching import DDP, LORA, PROJECT, environment
from patching import free_port
from sd3.common.synthetic_data import make_subject
from sd3.tiny_world import measure
from sd3.tiny_world.classifier import right
from sd3.tiny_world.grammar import held_out_captions, told_by
from sd3.tiny_world.subject import subject_score

PROMPT = "a sks star"
OF_SUBJECT = [
    f"a sks star {place}, on a {background} background"
    for place in ("on the left", "on the right", "at the top", "in the centre")
    for background in ("white", "black", "grey")
]
OF_CLASS = [f"a {colour} star" for colour in ("red", "green", "pink", "cyan", "orange", "yellow")] * 2
STEPS = {"full": 200, "lora": 200}
LEARNING_RATES = {"full": 1e-4, "lora": 1e-3}
SEEN = 0.5  # of the detector, between 0.25 at most for what is not the subject and 0.9 for what is


@dataclass(frozen=True)
class Result:
    """What a model paints, as shares of pictures from 0 to 1."""

    subject: float  # of the subject's prompts, that show it
    score: float  # mean of the subject's detector on them
    background: float  # of them, with the background that was asked for
    others: float  # of held-out captions of the world, attributes that are shown
    leaked: float  # of prompts for plain stars, that show the subject


def judged(pipeline: object) -> Result:
    """Paint and read the pictures."""
    subject = measure.paint(pipeline, OF_SUBJECT, seed=1)
    scores = [subject_score(picture) for picture in subject]
    background = [
        right(picture, told_by(text))["background"] for picture, text in zip(subject, OF_SUBJECT, strict=True)
    ]
    captions = held_out_captions(24, seed=5)
    pictures = measure.paint(pipeline, [caption for caption, _ in captions], seed=2)
    shown = [
        hit for picture, (_, told) in zip(pictures, captions, strict=True) for hit in right(picture, told).values()
    ]
    stars = [subject_score(picture) for picture in measure.paint(pipeline, OF_CLASS, seed=3)]
    return Result(
        sum(score >= SEEN for score in scores) / len(scores), sum(scores) / len(scores),
        sum(background) / len(background), sum(shown) / len(shown), sum(score >= SEEN for score in stars) / len(stars),
    )  # fmt: skip


@pytest.fixture(scope="module")
def before() -> Result:
    return judged(measure.load_pipeline(measure.MODEL))


@pytest.fixture(scope="module")
def subject_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "subject"
    make_subject(folder)
    return folder


def taught(folder: Path, data: Path, kind: str, engine: str, prior: bool = False, steps: int | None = None) -> Path:
    """Run a launcher as a user would; returns its run directory."""
    launcher = {"full": DDP, "lora": LORA}[kind]
    arguments = [
        f"--model_name={measure.MODEL}", f"--input_dir={data}", f"--instance_prompt={PROMPT}", "--device=cpu",
        f"--engine={engine}", "--mixed_precision=no", "--resolution=64", "--batch_size=4", "--validation_prompt=",
        f"--learning_rate={LEARNING_RATES[kind]}", f"--max_train_steps={steps or STEPS[kind]}", "--seed=0",
        "--num_processors=1", f"--main_process_port={free_port()}", f"--output_dir={folder / 'run'}", "--",
    ]  # fmt: skip
    arguments += ["--rank=16"] if kind == "lora" else []
    if prior:
        arguments += ["--with_prior_preservation", f"--class_data_dir={folder / 'class'}", "--class_prompt=a star",
                      "--num_class_images=24"]  # fmt: skip
    result = subprocess.run(
        ["bash", str(PROJECT / "sd3" / launcher), *arguments], env=environment(), capture_output=True, text=True,
        stdin=subprocess.DEVNULL, timeout=900,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return folder / "run"


def result_of(run: Path, kind: str) -> Result:
    """What the model of a run paints."""
    pipeline = measure.load_pipeline(run if kind == "full" else measure.MODEL)
    if kind == "lora":
        pipeline.load_lora_weights(str(run), weight_name="pytorch_lora_weights.safetensors")
    return judged(pipeline)


ENGINES = [pytest.param("diffusers", marks=[pytest.mark.upstream, pytest.mark.long]), "native"]


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("engine", ENGINES)
def test_the_subject_is_learned_and_the_world_is_kept(
    tmp_path: Path, request: pytest.FixtureRequest, before: Result, subject_dir: Path, kind: str, engine: str
) -> None:
    if engine == "diffusers":
        request.getfixturevalue("upstream_checkout")
    after = result_of(taught(tmp_path, subject_dir, kind, engine), kind)
    print(kind, engine, before, after)
    assert before.subject == 0
    assert after.subject >= 0.8
    assert after.score >= before.score + 0.5
    assert after.others >= before.others - 0.15
