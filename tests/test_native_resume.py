"""A run that was stopped or killed, and resumed, ends as one that was not: bit for bit."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

import native_runs
from native_parts import noise_pictures

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
LAUNCHED = [mode for mode in MODES if MODES[mode][1] > 1]
MOMENTS = {"full": 90, "lora": 45}  # a run has about as many at which KilledWhileWriting can have it killed


def settings(mode: str) -> dict[str, object]:
    _, ranks, deepspeed, _ = MODES[mode]
    return {"ranks": ranks, "deepspeed": deepspeed, "precision": "bf16" if deepspeed else "no"}


def arguments(mode: str, output: Path, model: Path, data: Path, *more: str) -> list[object]:
    kind, _, _, own = MODES[mode]
    fixed = ["--seed=7", "--train_batch_size=2", f"--max_train_steps={STEPS}", "--checkpointing_steps=2"]
    return [kind, output, model, [f"--instance_data_dir={data}"], *fixed, *own, *more]


def straight_run(mode: str, model: Path, data: Path, folder: Path) -> Path:
    """A run without a stop; of one rank, in a fork."""
    if MODES[mode][1] == 1:
        process = native_runs.forked(*arguments(mode, folder / "straight", model, data))
        assert native_runs.finished(process) == 0, native_runs.log_of(folder / "straight").read_text()
    else:
        done = native_runs.run(*arguments(mode, folder / "straight", model, data), **settings(mode))
        assert done.returncode == 0, done.stdout
    return folder / "straight"


def assert_same_runs(one: Path, other: Path, steps: tuple[int, ...]) -> None:
    assert native_runs.losses(one) == native_runs.losses(other)
    for step in steps:
        states = [native_runs.state(folder / f"checkpoint-{step}") for folder in (one, other)]
        native_runs.assert_same(*states)
    for result in ("transformer", "."):
        states = [native_runs.weights_in(folder / result) for folder in (one, other)]
        native_runs.assert_same(*states)


def complete(output: Path) -> list[Path]:
    return list(output.glob("checkpoint-*/complete"))


@pytest.mark.long
@pytest.mark.parametrize("mode", LAUNCHED)
def test_several_ranks_killed_and_resumed_end_as_if_not(
    mode: str, tiny_model: Path, dog_dir: Path, tmp_path: Path
) -> None:
    straight = straight_run(mode, tiny_model, dog_dir, tmp_path)
    output = tmp_path / "broken"
    moments = random.Random(mode)
    again = arguments(mode, output, tiny_model, dog_dir, "--resume_from_checkpoint=latest")
    for _ in range(3):
        known = len(complete(output))
        broken = native_runs.start(*again, **settings(mode))
        native_runs.wait_for(lambda known=known: len(complete(output)) > known, broken)
        time.sleep(moments.uniform(0, 1))  # in a step, in the next checkpoint, in the result
        native_runs.kill(broken)
        broken.communicate()
    resumed = native_runs.run(*again, **settings(mode))
    assert resumed.returncode == 0, resumed.stdout
    assert_same_runs(straight, output, (2, 4, 6, 8))


class KilledAtStep:
    """Has the process killed when a step begins."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self) -> None:
        from sd3.native import stop

        seen = iter(range(1, 1_000_000))

        def ask(self_: object) -> None:
            if next(seen) == self.step:
                os.kill(os.getpid(), signal.SIGKILL)

        stop.Stopper.ask = ask


class KilledWhileWriting:
    """Has the process killed at the nth time that it brings a file to the disk, renames one or takes a hash."""

    def __init__(self, moment: int) -> None:
        self.moment = moment

    def __call__(self) -> None:
        from sd3.common import files
        from sd3.native import cache, checkpoint, checkpoint_files, outputs

        moments = iter(range(1, 1_000_000))

        def counted(function):
            def run(*arguments, **keywords):
                if next(moments) == self.moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **keywords)

            return run

        files.sync = counted(files.sync)
        os.replace = counted(os.replace)
        for module, name in (
            (checkpoint_files, "sync"), (checkpoint_files, "file_hash"), (checkpoint, "save_file"),
            (cache, "save_file"), (outputs, "sync"),
        ):  # fmt: skip
            setattr(module, name, counted(getattr(module, name)))


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_a_run_killed_in_the_middle_of_an_epoch_goes_on_as_if_not(
    mode: str, tiny_model: Path, dog_dir: Path, tmp_path: Path
) -> None:
    straight = straight_run(mode, tiny_model, dog_dir, tmp_path)
    again = arguments(mode, tmp_path / "broken", tiny_model, dog_dir, "--resume_from_checkpoint=latest")
    assert native_runs.finished(native_runs.forked(*again, before=KilledAtStep(6))) == -signal.SIGKILL
    assert native_runs.finished(native_runs.forked(*again)) == 0, native_runs.log_of(tmp_path / "broken").read_text()
    assert "Resuming from" in native_runs.log_of(tmp_path / "broken").read_text()
    assert_same_runs(straight, tmp_path / "broken", (6, 8))


def test_a_resume_need_not_be_told_the_seed(tiny_model: Path, tmp_path: Path) -> None:
    """By which crops are drawn too, where pictures are no squares."""
    (tmp_path / "pictures").mkdir()
    noise_pictures(tmp_path / "pictures")
    common = arguments("full", tmp_path / "run", tiny_model, tmp_path / "pictures", "--resolution=32")
    straight = arguments("full", tmp_path / "straight", tiny_model, tmp_path / "pictures", "--resolution=32")
    assert native_runs.finished(native_runs.forked(*straight)) == 0
    assert native_runs.finished(native_runs.forked(*common, before=KilledAtStep(4))) == -signal.SIGKILL
    common.remove("--seed=7")
    assert native_runs.finished(native_runs.forked(*common, "--resume_from_checkpoint=latest")) == 0
    assert "not as it would have" not in native_runs.log_of(tmp_path / "run").read_text()
    assert_same_runs(tmp_path / "straight", tmp_path / "run", (4, 6, 8))


def killed_until_done(mode: str, model: Path, data: Path, output: Path, moments: random.Random, most: int) -> int:
    """Start a run again and again, killed while it writes at a random moment, until it ends; returns the kills."""
    again = arguments(mode, output, model, data, "--resume_from_checkpoint=latest")
    for kills in range(30):
        status = native_runs.finished(native_runs.forked(*again, before=KilledWhileWriting(moments.randint(1, most))))
        assert status in (0, -signal.SIGKILL), native_runs.log_of(output).read_text()
        if status == 0:
            return kills
    assert native_runs.finished(native_runs.forked(*again)) == 0
    return kills


@pytest.mark.parametrize(
    ("mode", "seed"),
    [("full", 0), *(pytest.param(mode, seed, marks=pytest.mark.long) for mode in ("full", "lora") for seed in (1, 2))],
)
def test_kills_inside_writes_lose_nothing(
    mode: str, seed: int, tiny_model: Path, dog_dir: Path, tmp_path: Path
) -> None:
    straight = straight_run(mode, tiny_model, dog_dir, tmp_path / "a")
    kills = killed_until_done(mode, tiny_model, dog_dir, tmp_path / "b" / "run", random.Random(seed), MOMENTS[mode])
    assert kills > 2
    assert_same_runs(straight, tmp_path / "b" / "run", (2, 4, 6, 8))
    assert not list((tmp_path / "b" / "run").glob(".*partial*"))
    entries = [
        {file.name: file.read_bytes() for file in (tmp_path / name / "precomputed").rglob("[!.]*.safetensors")}
        for name in ("a", "b")
    ]
    assert entries[0] == entries[1]
