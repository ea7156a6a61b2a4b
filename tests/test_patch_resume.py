"""Resuming: the symptom without each patch, and none with all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from patching import Run, train

pytestmark = [pytest.mark.upstream, pytest.mark.long]
RESUME = "--resume_from_checkpoint=latest"


@pytest.fixture(autouse=True)
def _checkout(upstream_checkout: Path) -> None:
    """Every test here needs it."""


def straight_and_resumed(
    tmp_path: Path, kind: str, model: Path, data: list[str], without: str | None, ranks: int, deepspeed: bool = False
) -> tuple[Run, Run]:
    """8 steps straight, and 3 with a resume to 8; the second run's log and events cover both of its sessions."""
    common = {"without": without, "ranks": ranks, "deepspeed": deepspeed}
    steps = ("--checkpointing_steps=3", "--seed=3")
    straight = train(kind, tmp_path / "straight", model, data, "--max_train_steps=8", *steps, **common)
    train(kind, tmp_path / "resumed", model, data, "--max_train_steps=3", *steps, **common)
    resumed = train(kind, tmp_path / "resumed", model, data, "--max_train_steps=8", *steps, RESUME, **common)
    return straight, resumed


@pytest.mark.parametrize(
    ("kind", "ranks", "deepspeed"), [("full", 1, False), ("lora", 2, False), ("full", 2, True), ("full", 2, False)]
)
def test_a_resume_goes_on_where_it_stopped(
    tmp_path: Path, tiny_model: Path, dog_dir: Path, kind: str, ranks: int, deepspeed: bool
) -> None:
    """0005, 0010 and 0011 together: the same losses, and the same noise on every rank."""
    data = [f"--instance_data_dir={dog_dir}"]
    straight, resumed = straight_and_resumed(tmp_path, kind, tiny_model, data, None, ranks, deepspeed)
    assert straight.status == resumed.status == 0, resumed.log
    assert [step for step, _ in resumed.scalars("loss")] == list(range(1, 9))
    assert [loss for _, loss in resumed.scalars("loss")] == pytest.approx(
        [loss for _, loss in straight.scalars("loss")], rel=1e-4
    )
    for rank in range(ranks):
        assert resumed.events("noise", rank) == pytest.approx(straight.events("noise", rank), rel=1e-6)


def test_0005_without_it_a_resume_repeats_data_and_overshoots(tmp_path: Path, tiny_model: Path, dog_dir: Path) -> None:
    data = [f"--instance_data_dir={dog_dir}"]
    straight, resumed = straight_and_resumed(tmp_path, "full", tiny_model, data, "0005", 1)
    assert [step for step, _ in straight.scalars("loss")] == list(range(1, 9))
    assert [step for step, _ in resumed.scalars("loss")][-1] == 9
    assert resumed.scalars("loss")[3][1] != pytest.approx(straight.scalars("loss")[3][1], rel=1e-4)


def test_0005_a_finished_run_makes_no_further_step(tmp_path: Path, tiny_model: Path, dog_dir: Path) -> None:
    data = [f"--instance_data_dir={dog_dir}"]
    arguments = ("--max_train_steps=5", "--checkpointing_steps=5", "--validation_prompt=a dog", "--seed=0")
    arguments = (*arguments, "--num_validation_images=1")
    assert train("lora", tmp_path / "out", tiny_model, data, *arguments).status == 0
    again = train("lora", tmp_path / "out", tiny_model, data, *arguments, RESUME)
    assert again.status == 0, again.log
    assert [step for step, _ in again.scalars("loss")] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("without", ["0006", None])
def test_0006_latest_passes_over_a_checkpoint_cut_short(
    tmp_path: Path, tiny_model: Path, dog_dir: Path, without: str | None
) -> None:
    data = [f"--instance_data_dir={dog_dir}"]
    arguments = ("--max_train_steps=6", "--checkpointing_steps=2", "--checkpoints_total_limit=1", "--seed=0")
    killed = train(
        *("full", tmp_path / "out", tiny_model, data, *arguments),
        without=without,
        environment={"SPY_KILL_AT": "checkpoint-4/optimizer.bin"},
    )
    assert killed.status != 0
    assert (killed.output / "checkpoint-4").exists()
    resumed = train("full", tmp_path / "out", tiny_model, data, *arguments, RESUME, without=without)
    if without:
        assert resumed.status != 0
        assert "Resuming from checkpoint checkpoint-4" in resumed.log
    else:
        assert resumed.status == 0, resumed.log
        assert "Resuming from checkpoint checkpoint-2" in resumed.log
        assert [path.name for path in resumed.output.glob("checkpoint-*")] == ["checkpoint-6"]


@pytest.mark.parametrize("without", ["0011", None])
def test_0011_every_rank_keeps_its_random_state(
    tmp_path: Path, tiny_model: Path, dog_dir: Path, without: str | None
) -> None:
    data = [f"--instance_data_dir={dog_dir}"]
    run = train(
        *("lora", tmp_path / "out", tiny_model, data, "--max_train_steps=2", "--checkpointing_steps=2"),
        without=without,
        ranks=2,
    )
    assert run.status == 0, run.log
    kept = sorted(path.name for path in (run.output / "checkpoint-2").glob("random_states_*.pkl"))
    assert kept == (["random_states_0.pkl"] if without else ["random_states_0.pkl", "random_states_1.pkl"])


@pytest.mark.parametrize("without", ["0018", None])
@pytest.mark.parametrize(("kind", "ranks"), [("full", 1), ("lora", 2)])
def test_0018_the_random_state_of_an_npu_is_kept(
    tmp_path: Path, tiny_model: Path, dog_dir: Path, kind: str, ranks: int, without: str | None
) -> None:
    common = {"without": without, "ranks": ranks, "environment": {"SPY_NPU": "1"}}
    data = [f"--instance_data_dir={dog_dir}"]
    first = train(kind, tmp_path / "out", tiny_model, data, "--max_train_steps=1", "--checkpointing_steps=1", **common)
    assert first.status == 0, first.log
    resumed = train(kind, tmp_path / "out", tiny_model, data, "--max_train_steps=2", RESUME, **common)
    assert resumed.status == 0, resumed.log
    files = sorted(first.output.glob("checkpoint-1/npu_random_state_*"))
    assert len(files) == (0 if without else ranks)
    restored = [resumed.events("npu", rank) for rank in range(ranks)]
    assert restored == ([[]] * ranks if without else [[torch.load(file).double().sum().item()] for file in files])
