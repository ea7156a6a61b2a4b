"""Checkpoint directories of the native engine: checked, rotated, refused by name, and never executed."""

from __future__ import annotations

import argparse
import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType

import native_runs
from sd3.common.command_line import UserError
from sd3.native import checkpoint, checkpoint_files
from sd3.native.checkpoint import pack, unpack


def make(output: Path, step: int, content: str = "weights") -> Path:
    """A checkpoint of one file."""
    folder = output / f"checkpoint-{step}"
    aside = output / f".{folder.name}.partial"
    (aside / "transformer").mkdir(parents=True)
    (aside / "transformer" / "model.safetensors").write_text(content)
    checkpoint_files.finish(aside, folder)
    return folder


def test_a_checkpoint_is_found_whole(tmp_path: Path) -> None:
    make(tmp_path, 2)
    ten = make(tmp_path, 10)
    (tmp_path / "checkpoint-12").mkdir()  # never completed
    assert checkpoint_files.find(tmp_path, "latest") == ten
    assert checkpoint_files.find(tmp_path, "checkpoint-2").name == "checkpoint-2"
    assert checkpoint_files.find(tmp_path, str(ten)) == ten
    assert checkpoint_files.find(tmp_path / "empty", "latest") is None
    with pytest.raises(UserError, match="checkpoint-12 is no complete checkpoint .* checkpoint-2, checkpoint-10"):
        checkpoint_files.find(tmp_path, "checkpoint-12")


def cut(file: Path) -> None:
    file.write_text("weight")


def change(file: Path) -> None:
    file.write_text("WEIGHTS")


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (cut, "transformer/model.safetensors has 6 bytes, expected 7"),
        (change, "transformer/model.safetensors is not what was written"),
        (Path.unlink, "transformer/model.safetensors is missing"),
        (lambda file: file.with_name("extra.bin").write_text("x"), "transformer/extra.bin does not belong"),
        (lambda file: (file.parents[1] / "manifest.json").write_text("{"), "manifest.json cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_offered(harm, says: str, tmp_path: Path) -> None:
    make(tmp_path, 2)
    harm(make(tmp_path, 4) / "transformer" / "model.safetensors")
    with pytest.raises(UserError) as refusal:
        checkpoint_files.find(tmp_path, "latest")
    assert f"{tmp_path / 'checkpoint-4'} is damaged ({says}); resume from the one before, checkpoint-2" in str(
        refusal.value
    )


def test_a_checkpoint_of_the_other_engine_is_named_as_such(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    (folder / "complete").touch()
    with pytest.raises(UserError, match="not written by the native engine; resume with --engine=diffusers"):
        checkpoint_files.find(tmp_path, "latest")


def test_writing_over_a_checkpoint_replaces_it_whole(tmp_path: Path) -> None:
    make(tmp_path, 2, "old")
    folder = make(tmp_path, 2, "new")
    assert (folder / "transformer" / "model.safetensors").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_rotation_keeps_the_newest_and_the_multiples(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8, 10):
        make(tmp_path, step)
    checkpoint_files.rotate(tmp_path, None, None)
    assert len(checkpoint_files.complete_checkpoints(tmp_path)) == 5
    checkpoint_files.rotate(tmp_path, 1, 4)
    assert [path.name for path in checkpoint_files.complete_checkpoints(tmp_path)] == [
        "checkpoint-4", "checkpoint-8", "checkpoint-10"
    ]  # fmt: skip
    checkpoint_files.rotate(tmp_path, 1, None)
    assert [path.name for path in checkpoint_files.complete_checkpoints(tmp_path)] == ["checkpoint-10"]


def test_leftovers_of_a_kill_are_cleared(tmp_path: Path) -> None:
    make(tmp_path, 2)
    for name in (".checkpoint-4.partial", ".checkpoint-1.former", "checkpoint-4", "checkpoint-1"):
        (tmp_path / name).mkdir()
    checkpoint_files.clear_leftovers(tmp_path, newer_than=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]


def test_an_optimizer_state_survives_packing() -> None:
    weight = torch.nn.Parameter(torch.randn(3, 2))
    optimizer = torch.optim.AdamW([{"params": [weight], "lr": 0.1 + 0.2}])
    weight.sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    state["state"][0]["note"] = 1.5  # Prodigy and others keep plain numbers too
    tensors, rest = pack(state)
    again = unpack(tensors, json.loads(json.dumps(rest)))
    assert again["param_groups"] == state["param_groups"]
    native_runs.assert_same(again["state"][0], state["state"][0])


def accelerator(ranks: int = 1, deepspeed: bool = False) -> SimpleNamespace:
    kind = DistributedType.DEEPSPEED if deepspeed else DistributedType.NO
    return SimpleNamespace(is_main_process=True, num_processes=ranks, distributed_type=kind)


@pytest.mark.parametrize(
    ("facts", "now", "says"),
    [
        ({"deepspeed": True, "ranks": 4}, {"deepspeed": True, "ranks": 2}, "written by 4 ranks.* resume with 4 ranks"),
        ({"deepspeed": True}, {}, "written with DeepSpeed; resume it with DeepSpeed"),
        ({}, {"deepspeed": True}, "written without DeepSpeed"),
        ({"kind": "full"}, {}, "is of a full fine-tune, and this is a lora one"),
        ({"format": 99}, {}, "has format 99, expected 1"),
        ({"ranks": 4}, {"ranks": 2}, None),
    ],
)
def test_what_cannot_be_resumed_from_is_refused(
    facts: dict, now: dict, says: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "broadcast_object_list", lambda found: found)
    aside = tmp_path / ".partial"
    aside.mkdir()
    state = {"format": 1, "kind": "lora", "deepspeed": False, "ranks": 1, **facts}
    (aside / "state.json").write_text(json.dumps(state))
    checkpoint_files.finish(aside, tmp_path / "checkpoint-2")
    options = argparse.Namespace(output_dir=str(tmp_path), resume_from_checkpoint="latest")
    if says is None:
        assert checkpoint.find(options, accelerator(**now), "lora")[1] == state
    else:
        with pytest.raises(UserError, match=says):
            checkpoint.find(options, accelerator(**now), "lora")


class Bomb:
    """Unpickling it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def train(output: Path, model: Path, data: Path, *more: str, ranks: int = 1) -> str:
    """Four steps of a LoRA run with checkpoints at 2 and 4; returns the first rank's log."""
    run = ["lora", output, model, [f"--instance_data_dir={data}"], "--seed=5", "--max_train_steps=4"]
    found = native_runs.forked_ranks(*run, "--checkpointing_steps=2", *more, ranks=ranks)
    for process in found:
        native_runs.finished(process)
    return native_runs.log_of(output).read_text()


@pytest.mark.parametrize("name", ["optimizer.safetensors", "pytorch_lora_weights.safetensors", "state.json"])
def test_a_crafted_checkpoint_is_refused_and_not_run(
    name: str, tiny_model: Path, dog_dir: Path, tmp_path: Path
) -> None:
    output, mark = tmp_path / "run", tmp_path / "executed"
    train(output, tiny_model, dog_dir, "--train_batch_size=1")
    crafted = output / "checkpoint-4"
    (crafted / name).write_bytes(pickle.dumps(Bomb(mark)))
    manifest = json.loads((crafted / "manifest.json").read_text())
    manifest["files"][name] = {
        "bytes": (crafted / name).stat().st_size, "sha256": checkpoint_files.file_hash(crafted / name)
    }  # fmt: skip
    (crafted / "manifest.json").write_text(json.dumps(manifest))
    log = train(output, tiny_model, dog_dir, "--train_batch_size=1", "--resume_from_checkpoint=latest")
    assert f"{crafted} cannot be read" in log
    assert "Traceback" not in log
    assert not mark.exists()


def test_two_ranks_draw_what_one_does_and_a_run_goes_on_with_another_number(
    tiny_model: Path, dog_dir: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    train(one, tiny_model, dog_dir, "--train_batch_size=2")
    train(two, tiny_model, dog_dir, "--train_batch_size=1", ranks=2)
    expected, found = native_runs.losses(one), native_runs.losses(two)
    # The same samples with the same draws; the sums are taken in another order.
    assert found == pytest.approx(expected, rel=1e-4)
    resumed = train(two, tiny_model, dog_dir, "--train_batch_size=2", "--resume_from_checkpoint=checkpoint-2")
    assert "Resuming from" in resumed
    assert native_runs.losses_of_last_session(two) == pytest.approx({3: expected[3], 4: expected[4]}, rel=1e-4)


def test_a_lora_of_another_rank_is_refused(tiny_model: Path, dog_dir: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", tiny_model, dog_dir, "--train_batch_size=1")
    log = train(tmp_path / "run", tiny_model, dog_dir, "--rank=8", "--resume_from_checkpoint=latest")
    assert "holds a LoRA of another rank or other layers" in log
