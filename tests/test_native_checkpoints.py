"""Checkpoint directories of the native engine: checked, rotated, refused by name, and never executed."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType

import native_runs
from native_parts import options as native_options
from native_parts import with_changed
from sd3.common.command_line import UserError
from sd3.native import checkpoint, checkpoint_files
from sd3.native.checkpoint import pack, unpack
from sd3.native.flag_changes import FIXED, FREE, HELD, changed_facts, differences, facts_of, remembered
from sd3.native.model import Trained
from sd3.native.optimizer import make_lr_schedule
from sd3.native.options import flags


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


def test_what_a_run_goes_back_behind_is_set_aside(tmp_path: Path) -> None:
    """Damaged or of another past, it must be taken neither for the last good one nor for the newest."""
    for step in (2, 4, 8):
        make(tmp_path, step)
    assert checkpoint_files.set_aside(tmp_path, newer_than=2) == [
        tmp_path / "abandoned-checkpoint-4", tmp_path / "abandoned-checkpoint-8"
    ]  # fmt: skip
    make(tmp_path, 4, "again")
    assert checkpoint_files.set_aside(tmp_path, newer_than=2) == [tmp_path / "abandoned-checkpoint-4.2"]
    assert checkpoint_files.find(tmp_path, "latest") == tmp_path / "checkpoint-2"
    assert (tmp_path / "abandoned-checkpoint-8" / "transformer" / "model.safetensors").read_text() == "weights"


def test_a_checkpoint_of_another_directory_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "run", 2)
    other = make(tmp_path / "other", 2)
    with pytest.raises(UserError, match=f"{other} is no complete checkpoint of {tmp_path / 'run'}"):
        checkpoint_files.find(tmp_path / "run", str(other))


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


STATE = {
    "format": 2, "kind": "lora", "deepspeed": False, "ranks": 1, "step": 2, "position": 4, "seed": 5, "data": "hash",
    "flags": {"seed": None, "optimizer": "AdamW", "use_8bit_adam": False}, "schedule": {}, "optimizer": {},
}  # fmt: skip


ABSENT = object()
DEEPSPEED = {"deepspeed": True, "optimizer": ABSENT}
PRODIGY = {**STATE["flags"], "optimizer": "prodigy"}


def accelerator(ranks: int = 1, deepspeed: bool = False) -> SimpleNamespace:
    kind = DistributedType.DEEPSPEED if deepspeed else DistributedType.NO
    return SimpleNamespace(is_main_process=True, num_processes=ranks, distributed_type=kind)


@pytest.mark.parametrize(
    ("facts", "now", "flags", "says"),
    [
        ({**DEEPSPEED, "ranks": 4}, {"deepspeed": True, "ranks": 2}, [], "written by 4 ranks.* with 4 ranks"),
        (DEEPSPEED, {}, [], "written with DeepSpeed; resume it with DeepSpeed"),
        ({}, {"deepspeed": True}, [], "written without DeepSpeed"),
        ({"kind": "full"}, {}, [], "is of a full fine-tune, and this is a lora one"),
        ({"format": 99}, {}, [], "has format 99, expected 2"),
        ({"step": 9, "position": 9}, {}, ["--max_train_steps=8"], "--max_train_steps=8 is less than the 9 steps of"),
        ({"flags": PRODIGY}, {}, [], "--optimizer=AdamW cannot go on from .* --optimizer=prodigy"),
        ({"position": "here"}, {}, [], "cannot be read .state.json: position is 'here', expected a whole number"),
        ({"schedule": None}, {}, [], "cannot be read .state.json: schedule is None, expected an object"),
        ({"ranks": 4}, {"ranks": 2}, ["--max_train_steps=2"], None),
    ],
)
def test_what_cannot_be_resumed_from_is_refused(
    facts: dict, now: dict, flags: list[str], says: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "broadcast_object_list", lambda found: found)
    aside = tmp_path / ".partial"
    aside.mkdir()
    state = {name: value for name, value in {**STATE, **facts}.items() if value is not ABSENT}
    (aside / "state.json").write_text(json.dumps(state))
    checkpoint_files.finish(aside, tmp_path / f"checkpoint-{state['step']}")
    options = native_options("--resume_from_checkpoint=latest", f"--output_dir={tmp_path}", *flags)
    if says is None:
        assert checkpoint.find(options, accelerator(**now), "lora")[1] == state
    else:
        with pytest.raises(UserError, match=says):
            checkpoint.find(options, accelerator(**now), "lora")


def test_each_flag_that_changed_is_told_and_which_value_holds(tmp_path: Path) -> None:
    before = remembered(native_options("--seed=1", "--learning_rate=1e-3", "--train_batch_size=2", "--log_every=3"))
    now = native_options("--learning_rate=1e-4", "--train_batch_size=3", "--max_train_steps=7")
    assert differences(tmp_path, before, now) == [
        "--train_batch_size was 2 and is 3: the run goes on, but not as it would have.",
        f"--learning_rate=0.0001 has no effect: {tmp_path} brings back 0.001.",
    ]
    assert differences(
        tmp_path, before, native_options("--seed=2", "--learning_rate=1e-3", "--train_batch_size=2")
    ) == [f"--seed=2 has no effect: {tmp_path} brings back 1."]


def test_every_flag_is_free_held_fixed_or_takes_effect() -> None:
    """No name in the three sets is one that the scripts do not have."""
    assert {flag.name for flag in flags("lora")} >= FREE | HELD | FIXED
    assert not FREE & HELD and not FREE & FIXED and not HELD & FIXED


@pytest.mark.parametrize(("schedule", "told"), [("linear", True), ("constant", False), ("constant_with_warmup", False)])
def test_another_number_of_steps_is_told_where_the_learning_rate_follows_it(
    tmp_path: Path, schedule: str, told: bool
) -> None:
    given = native_options(f"--lr_scheduler={schedule}")
    before, now = facts_of(given, "pictures", "weights", 500), facts_of(given, "pictures", "weights", 1000)
    sentence = f"The learning rate has another course, of 1000 steps, than in {tmp_path}: the run goes on, but not "
    assert changed_facts(tmp_path, before, now) == ([f"{sentence}as it would have."] if told else [])


@pytest.mark.parametrize(("deepspeed", "each"), [(False, 12), (True, 16)])
def test_no_rank_begins_to_write_where_there_is_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deepspeed: bool, each: int
) -> None:
    monkeypatch.setattr(checkpoint, "gather_object", lambda found: found)
    weight = torch.nn.Parameter(torch.zeros(1000, 1000))
    trained = SimpleNamespace(parameters=lambda: iter([weight]), kind="full", lora=False)
    options = native_options(f"--output_dir={tmp_path}")
    made = checkpoint.Checkpoints(options, accelerator(deepspeed=deepspeed), trained, None, None, None)
    assert made.least_bytes() == each * 10**6
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    with pytest.raises(UserError, match=f"checkpoint-3 could not be written .*it takes {each}.0 MB or more"):
        made.save(3, {})
    assert list(tmp_path.iterdir()) == []


class Bomb:
    """Unpickling it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def train(output: Path, model: Path, data: Path, *more: str, ranks: int = 1, kind: str = "lora") -> str:
    """Four steps of a run with checkpoints at 2 and 4; returns the first rank's log."""
    run = [kind, output, model, [f"--instance_data_dir={data}"], "--seed=5", "--max_train_steps=4"]
    found = native_runs.forked_ranks(*run, "--checkpointing_steps=2", *more, ranks=ranks)
    for process in found:
        native_runs.finished(process)
    return native_runs.log_of(output).read_text()


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("lora", "optimizer.safetensors"),
        ("lora", "pytorch_lora_weights.safetensors"),
        ("lora", "state.json"),
        ("full", "transformer/diffusion_pytorch_model.safetensors"),
    ],
)
def test_a_crafted_checkpoint_is_refused_and_not_run(
    kind: str, name: str, tiny_model: Path, dog_dir: Path, tmp_path: Path
) -> None:
    output, mark = tmp_path / "run", tmp_path / "executed"
    train(output, tiny_model, dog_dir, "--train_batch_size=1", kind=kind)
    crafted = output / "checkpoint-4"
    (crafted / name).write_bytes(pickle.dumps(Bomb(mark)))
    manifest = json.loads((crafted / "manifest.json").read_text())
    manifest["files"][name] = {
        "bytes": (crafted / name).stat().st_size, "sha256": checkpoint_files.file_hash(crafted / name)
    }  # fmt: skip
    (crafted / "manifest.json").write_text(json.dumps(manifest))
    log = train(output, tiny_model, dog_dir, "--train_batch_size=1", "--resume_from_checkpoint=latest", kind=kind)
    assert f"{crafted} cannot be read ({name}: " in log
    assert "resume from the one before, checkpoint-2" in log
    assert "Traceback" not in log
    assert not mark.exists()


def test_a_run_from_an_earlier_checkpoint_keeps_what_it_writes(tiny_model: Path, dog_dir: Path, tmp_path: Path) -> None:
    """The advice for a damaged checkpoint is followed with one checkpoint to keep: it must not be the damaged one."""
    output = tmp_path / "run"
    train(output, tiny_model, dog_dir, "--train_batch_size=1")
    cut(output / "checkpoint-4" / "optimizer.safetensors")
    log = train(output, tiny_model, dog_dir, "--train_batch_size=1", "--resume_from_checkpoint=checkpoint-2",
                "--checkpointing_steps=1", "--checkpoints_total_limit=1")  # fmt: skip
    assert f"it is now {output / 'abandoned-checkpoint-4'}" in log
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-4"]
    assert checkpoint_files.damage(output / "checkpoint-4") is None


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


@pytest.mark.parametrize("harm", ["other layers", "unreadable"])
def test_deepspeed_is_given_no_checkpoint_that_does_not_fit(tiny_model: Path, tmp_path: Path, harm: str) -> None:
    """It would take the weights of one layer for those of another of the same size."""
    asked = []

    def load_checkpoint(*_: object, **__: object) -> None:
        asked.append(harm)
        raise RuntimeError("size mismatch")

    layers = {"other layers": "attn.to_v", "unreadable": "attn.to_q"}[harm]
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    Trained(native_options("--lora_layers=attn.to_q"), "lora", tiny_model, torch.float32).write_weights(folder)
    trained = Trained(native_options(f"--lora_layers={layers}"), "lora", tiny_model, torch.float32)
    model, options = SimpleNamespace(load_checkpoint=load_checkpoint), native_options(f"--output_dir={tmp_path}")
    optimizer = torch.optim.AdamW(trained.parameters())
    schedule = make_lr_schedule(options, optimizer, 4)
    made = checkpoint.Checkpoints(options, accelerator(deepspeed=True), trained, model, None, schedule)
    says = {"other layers": "of another rank or other layers", "unreadable": "DeepSpeed's state is not what"}[harm]
    with pytest.raises(UserError, match=says):
        made.load(folder, {"schedule": schedule.state_dict(), "step": 2})
    assert asked == ([] if harm == "other layers" else [harm])


def test_another_base_model_is_told(tiny_model: Path, dog_dir: Path, tmp_path: Path) -> None:
    """A LoRA fits any model of the size; so does a full checkpoint the text encoders beside it."""
    other = with_changed(tiny_model, "text_encoder", tmp_path)
    for kind in ("lora", "full"):
        output = tmp_path / kind
        train(output, tiny_model, dog_dir, "--train_batch_size=1", "--max_train_steps=2", kind=kind)
        again = ("--train_batch_size=1", "--resume_from_checkpoint=latest")
        log = train(output, other, dog_dir, *again, kind=kind)
        assert f"The weights that are not trained are not those of {output / 'checkpoint-2'}" in log
        log = train(output, other, dog_dir, *again, "--max_train_steps=6", kind=kind)
        assert log.count("The weights that are not trained") == 1  # the log goes on
