"""DreamBooth works: the tiny SD3 learns a subject that it has never seen, and the evaluation tells how well.

As the quick start does it: five captioned pictures, a launcher, the inference script, the evaluation script.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from launching import DDP, LORA, PROJECT, environment
from patching import free_port
from prepared import PREPARED
from sd3.common.files import write_text
from sd3.common.pictures import pictures_in
from sd3.common.synthetic_data import make_subject
from sd3.quickstart.figures import world_figures
from sd3.tiny_world.measure import MODEL
from sd3.tiny_world.subject import TOKEN, subject_score

JUDGE = MODEL.with_name("judge")
GUIDANCE, SEEDS = 2.5, ("1", "2")
STEPS = 600
LAYERS = re.search(r"LORA_LAYERS=(\S+)\nLORA_LAYERS\+=(\S+)", (PROJECT / "sd3" / "quickstart.sh").read_text())
RATES = {"full": "1e-4", "lora": "2.5e-4"}
SCRIPT = {"full": [], "lora": ["--rank=32", f"--lora_layers={''.join(LAYERS.groups())}"]}
PRIOR = (
    "--with_prior_preservation", "--class_data_dir={folder}/class", "--class_prompt=a star", "--num_class_images=24",
)  # fmt: skip
PLAIN = [f"a {colour} star" for colour in ("red", "green", "pink", "cyan", "orange", "yellow")]
ENGINES = [pytest.param("diffusers", marks=[pytest.mark.upstream, pytest.mark.long]), "native"]
KINDS = ["full", pytest.param("lora", marks=pytest.mark.long)]


@dataclass(frozen=True)
class Model:
    """A model as the inference script is told of it, and what it paints: shares of pictures from 0 to 1."""

    flags: tuple[str, ...]
    pictures: Path
    subject: float  # of the subject's pictures, that show it
    place: float  # of them, with place and background as the prompt says
    others: float  # of the others, that show all that their prompt names


def command(*arguments: str, timeout: float = 900) -> str:
    """Run a command of the project as a user would; returns what it printed."""
    done = subprocess.run(
        arguments, env=environment(), cwd=PROJECT, capture_output=True, text=True, stdin=subprocess.DEVNULL,
        timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def paint(prompts: Path, folder: Path, *model: str) -> None:
    """Two pictures of each prompt of a file."""
    command(
        sys.executable, "sd3/infer_sd3_text2img.py", f"--prompts-file={prompts}", "--seeds", *SEEDS, "--height=64",
        "--width=64", f"--guidance-scale={GUIDANCE}", "--batch-size=6", "--device=cpu", "--dtype=float32",
        f"--output-dir={folder}", *model,
    )  # fmt: skip


def shown(folder: Path, *flags: str) -> Model:
    """Paint the quick start's prompts and read the pictures."""
    paint(PROJECT / "sd3" / "quickstart" / "prompts.txt", folder, *flags)
    return Model(flags, folder, *(figure.right / figure.of for figure in world_figures(folder)))


def evaluated(output: Path, subject: Path, base: Model, *others: Model) -> list[dict[str, float]]:
    """The evaluation's means by metric, of `base` and of each other."""
    models = (base, *others)
    command(
        sys.executable, "sd3/evaluate_sd3.py", "--pictures", *(str(one.pictures) for one in models),
        "--label", *map(str, range(len(models))),
        f"--subject-dir={subject / 'pictures'}", f"--subject={TOKEN} star", f"--clip-model={JUDGE / 'clip'}",
        f"--dino-model={JUDGE / 'vit'}", "--device=cpu", f"--output-dir={output}",
    )  # fmt: skip
    results = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
    return [{name: one["mean"] for name, one in found["metrics"].items()} for found in results["candidates"]]


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "subject"
    make_subject(folder)
    return folder


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return shown(tmp_path_factory.mktemp("before") / "pictures", f"--model={MODEL}")


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory, subject: Path) -> Callable[..., Model]:
    """What a model paints that a launcher taught the subject; each is trained once."""
    known: dict[tuple, Model] = {}

    def teach(kind: str, engine: str, *script: str, rate: str = "") -> Model:
        asked = (kind, engine, script, rate)
        if asked in known:
            return known[asked]
        folder = tmp_path_factory.mktemp(f"{kind}-{engine}")
        run = folder / "run"
        command(
            "bash", str(PROJECT / "sd3" / {"full": DDP, "lora": LORA}[kind]), f"--model_name={MODEL}",
            f"--dataset_name={subject / 'captioned'}", "--device=cpu", f"--engine={engine}", "--mixed_precision=no",
            "--resolution=64", "--batch_size=4", "--validation_prompt=", f"--max_train_steps={STEPS}", "--seed=0",
            f"--learning_rate={rate or RATES[kind]}", "--num_processors=1", f"--main_process_port={free_port()}",
            f"--output_dir={run}", "--", "--lr_scheduler=cosine", *SCRIPT[kind],
            *(one.format(folder=folder) for one in script),
        )  # fmt: skip
        flags = [f"--model={run}"] if kind == "full" else [f"--model={MODEL}", f"--lora={run}"]
        known[asked] = shown(folder / "pictures", *flags)
        return known[asked]

    return teach


def learned(base: Model, tuned: Model) -> None:
    """It shows the subject, where it is asked for, and has not lost the world."""
    assert base.subject == 0
    assert tuned.subject >= 0.4, tuned
    assert tuned.place >= 0.8, tuned
    assert tuned.others >= base.others - 0.4, (base, tuned)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ENGINES)
def test_the_subject_is_learned_and_the_world_is_kept(
    request: pytest.FixtureRequest, before: Model, taught: Callable[..., Model], kind: str, engine: str
) -> None:
    if engine == "diffusers":
        request.getfixturevalue("upstream_checkout")
    learned(before, taught(kind, engine))


def test_the_evaluation_ranks_the_tuned_model_above_its_base(
    before: Model, taught: Callable[..., Model], subject: Path, tmp_path: Path
) -> None:
    base, tuned = evaluated(tmp_path / "evaluation", subject, before, taught("full", "native"))
    assert tuned["dino"] > base["dino"] + 0.2, (base, tuned)
    assert tuned["clip-i"] > base["clip-i"] + 0.1, (base, tuned)


@pytest.mark.long
@pytest.mark.upstream
def test_the_evaluation_ranks_every_way_of_tuning_above_the_base(
    upstream_checkout: Path, before: Model, taught: Callable[..., Model], subject: Path, tmp_path: Path
) -> None:
    """And build/tests/dreambooth.md has the README's table."""
    ways = [(kind, engine) for kind in ("full", "lora") for engine in ("native", "diffusers")]
    models = {"before": before, **{", ".join(way): taught(*way) for way in ways}}
    models["full, native, rate 1e-3"] = taught("full", "native", rate="1e-3")
    models["full, native, prior"] = taught("full", "native", *PRIOR)
    found = evaluated(tmp_path / "evaluation", subject, *models.values())
    rows = [
        f"| {name} | {one.subject * 12:.0f} | {one.place * 12:.0f} | {one.others * 12:.0f} | "
        + " | ".join(f"{means[metric]:.3f}" for metric in ("clip-t", "clip-i", "dino")) + " |"
        for (name, one), means in zip(models.items(), found, strict=True)
    ]
    write_text(PREPARED / "dreambooth.md", "\n".join(rows) + "\n")
    base, *tuned = found
    for name, means in zip(list(models)[1:], tuned, strict=True):
        assert means["dino"] > base["dino"] + 0.2, (name, found)
        assert means["clip-i"] > base["clip-i"] + 0.1, (name, found)


@pytest.mark.long
def test_too_much_training_costs_prompt_fidelity(
    before: Model, taught: Callable[..., Model], subject: Path, tmp_path: Path
) -> None:
    """Ten times the learning rate: pictures are of the subject whatever the prompt, and the evaluation tells."""
    tuned, spoiled = taught("full", "native"), taught("full", "native", rate="1e-3")
    assert spoiled.others <= tuned.others - 0.2, (tuned, spoiled)
    _, good, bad = evaluated(tmp_path / "evaluation", subject, before, tuned, spoiled)
    assert bad["clip-t"] < good["clip-t"] - 0.05, (good, bad)


@pytest.mark.long
def test_prior_preservation_keeps_plain_stars_plain(
    before: Model, taught: Callable[..., Model], tmp_path: Path
) -> None:
    """Its pictures are of the class, and what they keep is the class: mean likeness of plain stars to the subject."""
    (tmp_path / "plain.txt").write_text("\n".join(PLAIN) + "\n")

    def likeness(model: Model, name: str) -> float:
        paint(tmp_path / "plain.txt", tmp_path / name, *model.flags)
        scores = [subject_score(Image.open(path)) for path, _ in pictures_in(tmp_path / name)]
        assert len(scores) == len(PLAIN) * len(SEEDS)
        return sum(scores) / len(scores)

    without, kept = taught("full", "native"), taught("full", "native", *PRIOR)
    learned(before, kept)
    assert likeness(kept, "kept") < likeness(without, "without") - 0.05
