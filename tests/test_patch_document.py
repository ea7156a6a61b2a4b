"""The source document's three edits, as the queue has them: the symptom without each patch, and none with all."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path
from types import SimpleNamespace

import pytest

from patching import SCRIPTS, Run, load_script, scripts_without, train

pytestmark = pytest.mark.upstream
VALIDATE = ("--validation_prompt=a dog", "--validation_epochs=1", "--num_validation_images=1", "--seed=0")


@pytest.fixture(autouse=True)
def _checkout(upstream_checkout: Path) -> None:
    """Every test here needs it."""


def dog(folder: Path) -> list[str]:
    return [f"--instance_data_dir={folder}"]


@pytest.mark.long
def test_0001_full_checkpoint_under_deepspeed_fails_without(tmp_path: Path, tiny_model: Path, dog_dir: Path) -> None:
    arguments = ("--max_train_steps=3", "--checkpointing_steps=2")
    run = train(
        "full", tmp_path / "out", tiny_model, dog(dog_dir), *arguments, without="0001", ranks=2, deepspeed=True
    )
    assert run.status != 0
    assert run.status is None or "IndexError: pop from empty list" in run.log


@pytest.mark.long
@pytest.mark.parametrize("without", ["0001", None])
def test_0001_rank_0_alone_rotates(tmp_path: Path, tiny_model: Path, dog_dir: Path, without: str | None) -> None:
    arguments = ("--max_train_steps=6", "--checkpointing_steps=2", "--checkpoints_total_limit=2")
    run = train(
        "lora", tmp_path / "out", tiny_model, dog(dog_dir), *arguments, without=without, ranks=2, deepspeed=True
    )
    removed = [[name for name in run.events("removed", rank) if name.startswith("checkpoint")] for rank in (0, 1)]
    if without:
        assert removed[1] != []
    else:
        assert run.status == 0, run.log
        assert removed == [["checkpoint-2"], []]
        assert sorted(path.name for path in run.output.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]


def assert_validation_leaves_all_as_it_was(run: Run) -> None:
    assert run.status == 0, run.log
    validations = run.events("validation")
    assert len(validations) >= 2  # one in the middle at least, and the last
    for before, after, _ in validations:
        assert before == after
    # The loss goes on being a number after a validation.
    assert [step for step, loss in run.scalars("loss") if loss == loss] == list(range(1, 8))


@pytest.mark.parametrize(
    ("kind", "deepspeed"),
    [
        ("full", True),
        pytest.param("full", False, marks=pytest.mark.long),
        pytest.param("lora", True, marks=pytest.mark.long),
        pytest.param("lora", False, marks=pytest.mark.long),
    ],
)
def test_0002_validates_in_the_middle(
    tmp_path: Path, tiny_model: Path, dog_dir: Path, kind: str, deepspeed: bool
) -> None:
    """Also 0001: checkpoints are written on the way, 2 ranks each."""
    arguments = ("--max_train_steps=7", "--checkpointing_steps=3", *VALIDATE)
    run = train(kind, tmp_path / "out", tiny_model, dog(dog_dir), *arguments, ranks=2, deepspeed=deepspeed)
    assert_validation_leaves_all_as_it_was(run)
    assert (run.output / "checkpoint-6" / "complete").exists()


@pytest.mark.long
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_0002_validation_dies_without(tmp_path: Path, tiny_model: Path, dog_dir: Path, kind: str) -> None:
    arguments = ("--max_train_steps=2", *VALIDATE)
    run = train(
        kind, tmp_path / "out", tiny_model, dog(dog_dir), *arguments, without="0002", ranks=2, deepspeed=True
    )
    assert run.status not in (0, None)
    assert "BFloat16" in run.log


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_0002_fp16_dtype_logic(tiny_model: Path, kind: str) -> None:
    """Parts in fp16 and fp32 side by side, as in an fp16 run, under CPU autocast to fp16."""
    import torch
    from accelerate import Accelerator
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_model)
    for part in (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3):
        part.to(torch.float16)
    if kind == "lora":
        pipeline.transformer.to(torch.float16)
    modules = (pipeline.transformer, pipeline.vae)
    before = [[(p.dtype, p.detach().clone()) for p in module.parameters()] for module in modules]
    accelerator = Accelerator(cpu=True)
    images = load_script(kind).log_validation(
        pipeline=pipeline,
        args=SimpleNamespace(seed=0, num_validation_images=1, validation_prompt="a dog"),
        accelerator=accelerator,
        pipeline_args={"prompt": "a dog", "num_inference_steps": 2, "height": 64, "width": 64},
        epoch=0,
        torch_dtype=torch.float16,
    )
    assert images[0].size == (64, 64)
    for module, kept in zip(modules, before, strict=True):
        for parameter, (dtype, value) in zip(module.parameters(), kept, strict=True):
            assert parameter.dtype == dtype
            assert torch.equal(parameter, value)


@pytest.mark.long
@pytest.mark.parametrize("without", ["0003", None])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_0003_a_log_has_a_line_for_each_step(
    tmp_path: Path, tiny_model: Path, dog_dir: Path, kind: str, without: str | None
) -> None:
    run = train(kind, tmp_path / "out", tiny_model, dog(dog_dir), "--max_train_steps=3", without=without)
    assert run.status == 0, run.log
    if without:
        assert "\rSteps:" in run.log
    else:
        assert "\rSteps:" not in run.log
        lines = [line for line in run.log.splitlines() if line.startswith("Steps:") and "loss=" in line]
        assert [line.split("| ")[1].split("/")[0] for line in lines] == ["1", "2", "3"] or len(lines) == 4


def test_0003_a_terminal_keeps_its_bar() -> None:
    """The script's own choice of stream, made in a terminal and in a pipe."""
    script = scripts_without(None) / SCRIPTS["full"]
    source = script.read_text(encoding="utf-8")
    stream = "class LineByLine" + source.split("class LineByLine")[1].split("\n\n\n")[0]
    option = next(line.strip().rstrip(",") for line in source.splitlines() if "LineByLine()" in line)
    program = (
        f"import sys\nfrom tqdm.auto import tqdm\n{stream}\n"
        f"bar = tqdm(range(2), desc='Steps', {option})\n"
        "for _ in range(2):\n    bar.update(1)\n    bar.set_postfix(loss=1.0)\nbar.close()\n"
    )
    piped = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stderr
    assert "\r" not in piped
    assert sum("loss=1" in line for line in piped.splitlines()) >= 2
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))  # tqdm draws nothing on a width of 0
    subprocess.run([sys.executable, "-c", program], stderr=follower, check=True)
    os.close(follower)
    shown = ""
    while True:
        try:
            shown += os.read(leader, 65536).decode()
        except OSError:  # the terminal's other end is closed
            break
    assert "\rSteps: " in shown
    assert shown.count("Steps:") > shown.count("\n")
