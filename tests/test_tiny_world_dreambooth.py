"""DreamBooth works: the tiny SD3 learns a subject that it has never seen, and the evaluation tells how well.

As the quick start does it: five captioned pictures, a launcher, the inference script, the evaluation script.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from launching import DDP, LORA, PROJECT, environment
from patching import free_port
from sd3.common.synthetic_data import make_subject
from sd3.quickstart.figures import world_figures
from sd3.tiny_world.measure import GUIDANCE, MODEL
from sd3.tiny_world.subject import TOKEN

JUDGE = MODEL.with_name("judge")
SETTINGS = {
    "full": ["--learning_rate=2e-4", "--batch_size=4"],
    "lora": ["--learning_rate=1e-3", "--batch_size=4"],
}  # fmt: skip
STEPS = {"full": 600, "lora": 600}
SEEDS = ("1", "2")
ENGINES = [pytest.param("diffusers", marks=[pytest.mark.upstream, pytest.mark.long]), "native"]
KINDS = ["full", pytest.param("lora", marks=pytest.mark.long)]


@dataclass(frozen=True)
class Result:
    """What a model paints: a folder of pictures, and shares of them from 0 to 1."""

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


def painted(folder: Path, *model: str) -> Result:
    """Paint the quick start's prompts and read the pictures."""
    command(
        sys.executable, "sd3/infer_sd3_text2img.py", "--prompts-file=sd3/quickstart/prompts.txt", "--seeds", *SEEDS,
        "--height=64", "--width=64", f"--guidance-scale={GUIDANCE}", "--batch-size=6", "--device=cpu",
        "--dtype=float32", f"--output-dir={folder}", *model,
    )  # fmt: skip
    return Result(folder, *(figure.right / figure.of for figure in world_figures(folder)))


def evaluated(output: Path, subject: Path, base: Result, *others: Result) -> list[dict[str, float]]:
    """The evaluation's means by metric, of `base` and of each other."""
    command(
        sys.executable, "sd3/evaluate_sd3.py", "--pictures", *(str(one.pictures) for one in (base, *others)),
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
def before(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return painted(tmp_path_factory.mktemp("before"), f"--model={MODEL}")


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory, subject: Path) -> Callable[..., Result]:
    """What a model paints that a launcher taught the subject; each is trained once."""
    known: dict[tuple, Result] = {}

    def teach(kind: str, engine: str = "native", steps: int | None = None, *script: str) -> Result:
        if (kind, engine, steps, script) in known:
            return known[kind, engine, steps, script]
        folder = tmp_path_factory.mktemp(f"{kind}-{engine}")
        run = folder / "run"
        command(
            "bash", str(PROJECT / "sd3" / {"full": DDP, "lora": LORA}[kind]), f"--model_name={MODEL}",
            f"--dataset_name={subject / 'captioned'}", "--device=cpu", f"--engine={engine}", "--mixed_precision=no",
            "--resolution=64", "--validation_prompt=", f"--max_train_steps={steps or STEPS[kind]}", "--seed=0",
            "--num_processors=1", f"--main_process_port={free_port()}", f"--output_dir={run}", *SETTINGS[kind],
            "--", "--lr_scheduler=cosine", *(["--rank=16"] if kind == "lora" else []),
            *(one.format(folder=folder) for one in script),
        )  # fmt: skip
        model = [f"--model={run}"] if kind == "full" else [f"--model={MODEL}", f"--lora={run}"]
        known[kind, engine, steps, script] = painted(folder / "pictures", *model)
        return known[kind, engine, steps, script]

    return teach
