"""Runs that must end, and what goes between ranks: the symptom without each patch, and none with all."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from patching import Run, load_script, train
from sd3.common.command_line import UserError

pytestmark = pytest.mark.upstream
STEPS = ("--max_train_steps=4", "--checkpointing_steps=2", "--seed=0")


@pytest.fixture(autouse=True)
def _checkout(upstream_checkout: Path) -> None:
    """Every test here needs it."""


@pytest.fixture
def dog(dog_dir: Path) -> list[str]:
    return [f"--instance_data_dir={dog_dir}"]


def holds_nan(run: Run) -> bool:
    file = run.output / "pytorch_lora_weights.safetensors"
    return any(value.isnan().any() for value in load_file(file).values())


def assert_stopped(run: Run, what: str, good: str) -> None:
    assert run.status == 1, run.log
    sentence = f"the {what}; lower --learning_rate or look at the images and the model. The last good checkpoint: "
    assert sentence + good.format(run.output) + "." in run.log.splitlines()
    assert "UserError" not in run.log
    assert not (run.output / "checkpoint-4").exists()
    assert not list(run.output.glob("*.safetensors"))
    assert not (run.output / "model_index.json").exists()


@pytest.mark.long
@pytest.mark.parametrize("without", ["0023", "0024", None])
def test_0023_and_0024_a_loss_that_is_nan_ends_the_run(
    tmp_path: Path, tiny_model: Path, dog: list[str], without: str | None
) -> None:
    environment = {"SPY_NAN": "0:3"}
    run = train("lora", tmp_path / "out", tiny_model, dog, *STEPS, without=without, environment=environment)
    if without == "0023":
        assert run.status != 0
        assert "No module named 'sd3'" in run.log or "NameError: name 'UserError'" in run.log
    elif without == "0024":
        assert run.status == 0, run.log
        assert holds_nan(run)
    else:
        assert_stopped(run, "loss of step 3 is nan", "{}/checkpoint-2")


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "ranks", "deepspeed", "extra"),
    [
        *(("full", 1, False, ()), ("full", 2, False, ("--gradient_accumulation_steps=2",)), ("lora", 2, True, ())),
        ("full", 2, True, ()),
    ],
)
def test_0024_all_ranks_end_with_the_one_whose_loss_is_nan(
    tmp_path: Path, tiny_model: Path, dog: list[str], kind: str, ranks: int, deepspeed: bool, extra: tuple[str, ...]
) -> None:
    """The first of two batches that are accumulated counts as well as the second."""
    environment = {"SPY_NAN": f"{ranks - 1}:{5 if extra else 3}"}
    options = {"ranks": ranks, "deepspeed": deepspeed, "environment": environment}
    run = train(kind, tmp_path / "out", tiny_model, dog, *STEPS, *extra, **options)
    assert_stopped(run, "loss of step 3 is nan", "{}/checkpoint-2")


@pytest.mark.long
@pytest.mark.parametrize("without", ["0024", None])
def test_0024_a_gradient_that_is_nan_ends_the_run_before_its_checkpoint(
    tmp_path: Path, tiny_model: Path, dog: list[str], without: str | None
) -> None:
    environment = {"SPY_NAN_GRADIENT": "4"}
    run = train("lora", tmp_path / "out", tiny_model, dog, *STEPS, without=without, environment=environment)
    if without:
        assert run.status == 0, run.log
        assert holds_nan(run)
    else:
        assert_stopped(run, "norm of the gradient of step 4 is nan", "{}/checkpoint-2")


@pytest.mark.long
def test_0024_without_a_checkpoint_there_is_none_to_name(tmp_path: Path, tiny_model: Path, dog: list[str]) -> None:
    run = train("lora", tmp_path / "out", tiny_model, dog, *STEPS, environment={"SPY_NAN": "0:1"})
    assert_stopped(run, "loss of step 1 is nan", "none")


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize(
    ("precision", "loss", "norm", "wrong"),
    [
        *(("fp16", 1.0, math.inf, None), ("fp16", 1.0, math.nan, None), ("fp16", math.inf, None, "loss")),
        *(("bf16", 1.0, math.inf, "norm of the gradient"), ("no", math.nan, 1.0, "loss"), ("bf16", 1.0, None, None)),
        *(("no", 1.0, 1.0, None), ("no", -math.inf, 1.0, "loss")),
    ],
)
def test_0024_in_fp16_an_overflow_is_no_fault(
    tmp_path: Path, kind: str, precision: str, loss: float, norm: float | None, wrong: str | None
) -> None:
    accelerator = SimpleNamespace(mixed_precision=precision, gather=lambda values: values, trackers=[])
    stop = load_script(kind).stop_unless_finite
    arguments = (accelerator, torch.tensor(loss, dtype=torch.float32), norm, 7, str(tmp_path))
    if wrong is None:
        stop(*arguments)
    else:
        with pytest.raises(UserError, match=f"^the {wrong} of step 7 is .* The last good checkpoint: none.$"):
            stop(*arguments)


@pytest.mark.long
@pytest.mark.parametrize("without", ["0022", None])
@pytest.mark.parametrize(("kind", "extra", "modules"), [("full", (), 1), ("lora", ("--train_text_encoder",), 3)])
def test_0022_gradients_are_reduced_once_per_step(
    tmp_path: Path, tiny_model: Path, dog: list[str], kind: str, extra: tuple[str, ...], modules: int,
    without: str | None,
) -> None:  # fmt: skip
    arguments = ("--gradient_accumulation_steps=4", "--max_train_steps=2", "--seed=0", "--repeats=4", *extra)
    run = train(kind, tmp_path / "out", tiny_model, dog, *arguments, without=without, ranks=2)
    assert run.status == 0, run.log
    assert len(run.events("reduction")) == modules * 2 * (4 if without else 1)


@pytest.mark.long
def test_0022_one_process_trains_to_the_same_bits(tmp_path: Path, tiny_model: Path, dog: list[str]) -> None:
    arguments = ("--gradient_accumulation_steps=2", "--max_train_steps=3", "--seed=0")
    runs = [train("lora", tmp_path / str(n), tiny_model, dog, *arguments, without=n) for n in ("0022", None)]
    assert [run.status for run in runs] == [0, 0], runs[1].log
    assert runs[0].scalars("loss") == runs[1].scalars("loss")
    first, second = (load_file(run.output / "pytorch_lora_weights.safetensors") for run in runs)
    assert all(torch.equal(first[key], second[key]) for key in first | second)
