"""A run that was stopped or killed, and resumed, ends as one that was not: bit for bit."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import native_runs
import pytest

STEPS = 8
# Name -> script, ranks, DeepSpeed, arguments. Between them: accumulation, flips, workers, an epoch's end in the middle.
MODES = {
    "full": ("full", 1, False, ["--gradient_accumulation_steps=2", "--random_flip"]),
    "lora": ("lora", 1, False, ["--dataloader_num_workers=2", "--train_text_encoder", "--lr_scheduler=cosine"]),
    "full-ddp": ("full", 2, False, ["--gradient_accumulation_steps=2", "--random_flip", "--gradient_checkpointing"]),
    "lora-ddp": ("lora", 2, False, ["--dataloader_num_workers=1", "--train_text_encoder"]),
    "full-deepspeed": ("full", 2, True, ["--random_flip", "--dataloader_num_workers=1"]),
    "lora-deepspeed": ("lora", 2, True, ["--gradient_accumulation_steps=2"]),
}
LONG = [pytest.param(mode, marks=pytest.mark.long) for mode in MODES if mode not in ("full", "lora-ddp")]


def settings(mode: str) -> dict[str, object]:
    _, ranks, deepspeed, _ = MODES[mode]
    return {"ranks": ranks, "deepspeed": deepspeed, "precision": "bf16" if deepspeed else "no"}


def arguments(mode: str, output: Path, model: Path, data: Path, *more: str) -> list[object]:
    kind, _, _, own = MODES[mode]
    fixed = ["--seed=7", "--train_batch_size=2", f"--max_train_steps={STEPS}", "--checkpointing_steps=2"]
    return [kind, output, model, [f"--instance_data_dir={data}"], *fixed, *own, *more]


@pytest.mark.parametrize("mode", ["full", "lora-ddp", *LONG])
def test_a_resumed_run_ends_as_a_straight_one(mode: str, tiny_model: Path, dog_dir: Path, tmp_path: Path) -> None:
    straight = native_runs.run(*arguments(mode, tmp_path / "straight", tiny_model, dog_dir), **settings(mode))
    assert straight.returncode == 0, straight.stdout
    broken = native_runs.start(*arguments(mode, tmp_path / "broken", tiny_model, dog_dir), **settings(mode))
    assert native_runs.wait_for((tmp_path / "broken" / "checkpoint-4" / "complete").exists, broken)
    native_runs.kill(broken)
    broken.communicate()
    resumed = native_runs.run(
        *arguments(mode, tmp_path / "broken", tiny_model, dog_dir, "--resume_from_checkpoint=checkpoint-4"),
        **settings(mode),
    )
    assert resumed.returncode == 0, resumed.stdout
    assert native_runs.losses(tmp_path / "broken") == native_runs.losses(tmp_path / "straight")
    for step in (6, 8):
        one, other = (native_runs.state(tmp_path / name / f"checkpoint-{step}") for name in ("straight", "broken"))
        native_runs.assert_same(one, other)
