"""Checkpoints that somebody changed, manifest included: refused by name, or a state that an optimizer can have."""

from __future__ import annotations

import copy
import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_parts import STEPS, Run, in_state, in_tensors, put, rewritten, tensor
from sd3.common.command_line import UserError
from sd3.native import checkpoint, checkpoint_files

MUTATIONS = 300


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "broadcast_object_list", lambda found: found)
    monkeypatch.setattr(checkpoint, "gather_object", lambda found: found)
    monkeypatch.setattr(checkpoint_files, "sync", lambda path: None)  # nobody cuts the power


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run with checkpoints after its steps 2 and 3."""
    output = tmp_path_factory.mktemp("states") / "run"
    output.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "gather_object", lambda found: found)
        run = Run(output, "--lr_scheduler=cosine")
        for step in range(1, STEPS + 1):
            run.step()
            if step > 1:
                run.checkpoints.save(step, {"position": 4 * step, "seed": 5, "data": "d", "base": "b", "course": 10})
    return output


WEIGHTS = "part/model.safetensors"
CHANGES = {
    "a short moment": (
        tensor("0.exp_avg", torch.zeros(3)),
        "optimizer.safetensors: 0.exp_avg has shape (3,), expected (64, 33)",
    ),
    "a long moment": (tensor("1.exp_avg_sq", torch.zeros(9)), "1.exp_avg_sq has shape (9,), expected ()"),
    "a turned moment": (tensor("0.exp_avg", torch.zeros(33, 64)), "0.exp_avg has shape (33, 64), expected (64, 33)"),
    "a moment in half": (
        tensor("0.exp_avg", torch.zeros(64, 33).half()),
        "0.exp_avg is torch.float16, expected torch.float32",
    ),
    "whole numbers": (
        tensor("0.exp_avg_sq", torch.zeros(64, 33, dtype=torch.int32)),
        "0.exp_avg_sq is torch.int32, expected",
    ),
    "no moment": (in_tensors(lambda found: found.pop("0.exp_avg")), "optimizer.safetensors: 0.exp_avg is missing"),
    "no state": (in_tensors(dict.clear), "optimizer.safetensors: 0.step is missing"),
    "a parameter more": (tensor("2.exp_avg", torch.zeros(3)), "'2.exp_avg' belongs to no parameter"),
    "a name more": (tensor("0.max_exp_avg_sq", torch.zeros(64, 33)), "'0.max_exp_avg_sq' belongs to no parameter"),
    "no number": (tensor("x.exp_avg", torch.zeros(3)), "'x.exp_avg' belongs to no parameter"),
    "another step": (tensor("0.step", torch.tensor(-1.0)), "0.step is -1, expected a whole number from 0 to 3"),
    "steps": (tensor("0.step", torch.ones(2)), "0.step has shape (2,), expected ()"),
    "no step": (tensor("0.step", torch.tensor(math.nan)), "0.step is nan, expected"),
    "numbers for tensors": (put("optimizer.state", {"0.exp_avg": 1.0}), "0.exp_avg is there twice"),
    "a weight less": (
        in_tensors(lambda found: found.pop("scale"), WEIGHTS),
        "part: scale, of the part in training, is missing",
    ),
    "a short weight": (
        tensor("weight", torch.zeros(3), WEIGHTS),
        f"{WEIGHTS}: weight has shape (3,), expected (64, 33)",
    ),
    "a weight in half": (
        tensor("scale", torch.ones(()).half(), WEIGHTS),
        f"{WEIGHTS}: scale is torch.float16, expected",
    ),
    "another weight": (tensor("bias", torch.zeros(3), WEIGHTS), "'bias' is not a weight of it"),
    "a list": (
        lambda folder: (folder / "state.json").write_text("[]"),
        "state.json: the state is [], expected an object",
    ),
    "depth": (lambda folder: (folder / "state.json").write_text("[" * 100_000), "state.json: it is not the JSON"),
    "no file": (lambda folder: (folder / "state.json").unlink(), "state.json: it is not the JSON"),
    "no moments": (
        lambda folder: (folder / "optimizer.safetensors").unlink(),
        "optimizer.safetensors: it is not the safetensors",
    ),
    "a step back": (put("step", 2), "state.json: step is 2, expected 3"),
    "a step that is true": (put("step", True), "step is True, expected a whole number"),
    "a position": (put("position", -4), "position is -4, expected a whole number from 1 to"),
    "a huge position": (put("position", 10**400), "position is 1000"),
    "a seed": (put("seed", 2**32), "seed is 4294967296, expected a whole number from 0 to 4294967295"),
    "a seed's text": (put("seed", "5"), "seed is '5', expected"),
    "the flag's seed": (
        put("flags.seed", "x"),
        "flags.seed is 'x', expected null or a whole number from 0 to 4294967295",
    ),
    "an optimizer": (put("flags.optimizer", None), "flags.optimizer is None, expected a text"),
    "a switch": (put("flags.use_8bit_adam", 1), "flags.use_8bit_adam is 1, expected true or false"),
    "a flag": (put("flags.learning", 1), "flags has 'learning', which is not expected"),
    "a flag out of range": (
        put("flags.adam_beta1", 1.5),
        "flags.adam_beta1 is 1.5, expected a number from 0 to below 1",
    ),
    "a fact": (put("Step", 3), "the state has 'Step', which is not expected"),
    "an escape": (put("\x1b[2Jx", 3), "the state has '\\x1b[2Jx', which is not expected"),
    "a schedule": (put("schedule", {}), "schedule has no _last_lr, expected"),
    "an attribute": (put("schedule.optimizer", 3), "schedule has 'optimizer', which is not expected"),
    "epochs": (put("schedule.last_epoch", 9), "schedule.last_epoch is 9, expected a whole number from 0 to 3"),
    "a count": (put("schedule._step_count", 0), "schedule._step_count is 0, expected 4"),
    "rates": (put("schedule.base_lrs", [1e-2]), "schedule.base_lrs is [0.01], expected a list of 2"),
    "an infinite rate": (
        put("schedule._last_lr.1", math.inf),
        "schedule._last_lr[1] is inf, expected a number from 0 up",
    ),
    "a lambda": (put("schedule.lr_lambdas.0", {"a": 1}), "schedule.lr_lambdas[0] is {'a': 1}, expected None"),
    "no groups": (put("optimizer.groups", []), "optimizer.groups is [], expected a list of 2"),
    "the other's parameter": (put("optimizer.groups.0.params", [1]), "optimizer.groups[0].params is [1], expected [0]"),
    "a rate": (put("optimizer.groups.0.lr", "fast"), "optimizer.groups[0].lr is 'fast', expected a number from 0 up"),
    "an initial rate": (
        put("optimizer.groups.1.initial_lr", 1.0),
        "optimizer.groups[1].initial_lr is 1.0, expected 0.005",
    ),
    "one beta": (put("optimizer.groups.0.betas", [0.9]), "optimizer.groups[0].betas is [0.9], expected a list of 2"),
    "a beta": (
        put("optimizer.groups.0.betas.1", 1),
        "optimizer.groups[0].betas[1] is 1, expected a number from 0 to below 1",
    ),
    "a maximum": (put("optimizer.groups.0.amsgrad", True), "optimizer.groups[0].amsgrad is True, expected False"),
    "both kernels": (
        put("optimizer.groups.0.foreach", True),
        "optimizer.groups[0] has foreach and fused, expected one",
    ),
    "a setting": (
        put("optimizer.groups.0.nesterov", True),
        "optimizer.groups[0] has 'nesterov', which is not expected",
    ),
    "no setting": (
        in_state(lambda state: state["optimizer"]["groups"][0].pop("eps")),
        "optimizer.groups[0] has no eps",
    ),
    "DeepSpeed's": (put("deepspeed", True), "deepspeed is True, expected an optimizer exactly where it is not"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "says"), CHANGES.values(), ids=CHANGES)
def test_what_was_changed_is_named_and_the_checkpoint_before_offered(
    saved: Path, tmp_path: Path, change: Callable[[Path], object], says: str
) -> None:
    folder = rewritten(saved, tmp_path / "run", change)
    with pytest.raises(UserError) as refusal:
        Run(tmp_path / "run", "--lr_scheduler=cosine").resume()
    said = str(refusal.value)
    assert said.startswith(f"{folder} cannot be read (") and says in said, said
    assert said.endswith("); resume from the one before, checkpoint-2.")
    assert refusal.value.status == 2 and said.isprintable()
    Run(tmp_path / "run", "--lr_scheduler=cosine", "--resume_from_checkpoint=checkpoint-2").resume()


def places(value: Any, at: tuple = ()) -> list[tuple]:
    """The path of everything inside of a nested value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(found for key, one in inner for found in places(one, (*at, key)))]


VALUES = (
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, -(2**70), 0.5, 1e308, -1e-9, math.inf, math.nan, "", "x", "3", [],
    [0], [[]], {}, {"0": 0}, [None] * 9,
)  # fmt: skip


def mutate_state(state: dict[str, Any], draws: random.Random) -> None:
    place = draws.choice(places(state)[1:])
    for key in place[:-1]:
        state = state[key]
    key = place[-1]
    kind = draws.choice(["set", "set", "set", "drop", "double", "rename"])
    if kind == "set":
        state[key] = draws.choice(VALUES)
    elif kind == "drop":
        del state[key]
    elif isinstance(state, list):
        state.append(copy.deepcopy(state[key]))
    else:
        state[f"{key}{draws.choice(['', 's', '.x'])}" if kind == "rename" else draws.choice("abc")] = state.pop(key)


def mutate_tensors(tensors: dict[str, torch.Tensor], draws: random.Random) -> None:
    name = draws.choice(sorted(tensors))
    shape = draws.choice([(), (0,), (1,), (3,), (33, 64), (64, 33), (64, 32), (65, 33), (2112,), (1, 64, 33)])
    dtype = draws.choice([torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool])
    kind = draws.choice(["shape", "dtype", "both", "drop", "rename", "value"])
    found = tensors.pop(name)
    if kind == "rename":
        tensors[draws.choice(["0.step", "1.exp_avg", "2.step", "-1.step", "0", "", ".", "0.exp_avg.x"])] = found
    elif kind == "value":
        tensors[name] = torch.full_like(found, draws.choice([-1.0, 0.0, 2.0, 0.5, 1e30, math.inf, math.nan]))
    elif kind != "drop":
        made = torch.zeros(shape if kind != "dtype" else tuple(found.shape))
        tensors[name] = made.to(dtype if kind != "shape" else found.dtype)


def mutate_bytes(file: Path, draws: random.Random) -> None:
    data = bytearray(file.read_bytes())
    place = draws.randrange(min(len(data), draws.choice([16, 400, len(data)])))
    kind = draws.choice(["change", "change", "cut", "insert"])
    if kind == "change":
        data[place] = draws.randrange(256)
    elif kind == "cut":
        del data[place:]
    else:
        data[place:place] = draws.randbytes(draws.randint(1, 9))
    file.write_bytes(data)


def mutation(draws: random.Random) -> Callable[[Path], object]:
    kind = draws.choice(["state", "state", "tensors", "tensors", "weights", "bytes"])
    if kind == "state":
        return in_state(lambda state: mutate_state(state, draws))
    if kind == "bytes":
        file = draws.choice(["state.json", "optimizer.safetensors", WEIGHTS])
        return lambda folder: mutate_bytes(folder / file, draws)
    file = WEIGHTS if kind == "weights" else "optimizer.safetensors"
    return in_tensors(lambda tensors: mutate_tensors(tensors, draws), file)


def test_no_mutation_reaches_an_optimizer_that_it_does_not_fit(saved: Path, tmp_path: Path) -> None:
    """Each is refused in a sentence, or is a state with which the run makes its next step."""
    refused = 0
    for seed in range(MUTATIONS):
        draws = random.Random(seed)
        rewritten(saved, tmp_path / "run", mutation(draws))
        run = Run(tmp_path / "run", "--lr_scheduler=cosine")
        try:
            run.resume()
        except UserError as error:
            refused += 1
            assert error.status == 2 and "checkpoint-3" in str(error) and str(error).isprintable(), (seed, error)
        else:
            run.step()
    assert MUTATIONS / 2 < refused < MUTATIONS


def test_what_was_not_changed_goes_on_bit_for_bit(saved: Path, tmp_path: Path) -> None:
    rewritten(saved, tmp_path / "run", lambda folder: None)
    straight, resumed = Run(saved, "--lr_scheduler=cosine"), Run(tmp_path / "run", "--lr_scheduler=cosine")
    for _ in range(STEPS):
        straight.step()
    resumed.resume()
    for run in (straight, resumed):
        run.step()
    assert torch.equal(straight.trained.parts["part"].weight, resumed.trained.parts["part"].weight)
    assert straight.schedule.state_dict() == resumed.schedule.state_dict()


@pytest.mark.parametrize("adamw", ["loop", "foreach", "fused"])
def test_another_way_of_computing_is_no_difference(tmp_path: Path, adamw: str, saved: Path) -> None:
    """The checkpoint brings its own back; so do those of versions of torch and devices that note less."""
    rewritten(saved, tmp_path / "run", in_state(lambda state: [
        group.pop(name) for group in state["optimizer"]["groups"] for name in ("maximize", "decoupled_weight_decay")
    ]))  # fmt: skip
    run = Run(tmp_path / "run", "--lr_scheduler=cosine", f"--adamw={adamw}")
    run.resume()
    run.step()
    assert {group["fused"] for group in run.optimizer.param_groups} == {True}
    assert {group["decoupled_weight_decay"] for group in run.optimizer.param_groups} == {True}


class Prodigy(torch.optim.AdamW):
    """Keeps what prodigyopt's keeps."""

    def __init__(self, groups: list[dict[str, Any]], **settings: Any) -> None:
        super().__init__([{key: group[key] for key in ("params", "lr")} for group in groups])
        for group in self.param_groups:
            for name in set(group) - {"params", "lr", "betas", "eps", "weight_decay"}:
                del group[name]
            group.update(beta3=None, d=1e-6, d0=1e-6, d_max=1e-6, d_numerator=0.0, d_coef=1.0, k=0, slice_p=2)
            group.update(growth_rate=math.inf, decouple=True, use_bias_correction=True, safeguard_warmup=True)

    def step(self, closure: object = None) -> None:
        for group in self.param_groups:
            group.update(k=group["k"] + 1, d_denom=1.0, d_hat=-1.0)
            for parameter in group["params"]:
                state, like = self.state[parameter], parameter.detach()
                if not state:
                    state |= {"step": 0, "exp_avg": torch.zeros_like(like), "exp_avg_sq": torch.zeros_like(like)}
                    state |= {"s": torch.zeros_like(like.flatten()[::2]), "p0": like.flatten()[::2].clone()}
                state["step"] += 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda folder: None, None),
        (tensor("1.p0", torch.tensor(0.0)), None),
        (tensor("0.s", torch.zeros(2112)), "0.s has shape (2112,), expected (1056,)"),
        (tensor("0.p0", torch.zeros(7)), "0.p0 has shape (7,), expected (1056,)"),
        (in_state(lambda state: state["optimizer"]["state"].update({"1.step": 7})), "1.step is 7, expected a whole"),
        (put("optimizer.groups.0.d", 0), "optimizer.groups[0].d is 0, expected a number above 0"),
        (put("optimizer.groups.1.lr", 0.5), "optimizer.groups[1].lr is 0.5, expected that of the first group"),
        (put("optimizer.groups.1.d0", "x"), "optimizer.groups[1].d0 is 'x', expected a number above 0"),
        (put("optimizer.groups.1.slice_p", 1), "optimizer.groups[1].slice_p is 1, expected 2"),
    ],
)
def test_prodigys_state_is_compared_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], object], says: str | None
) -> None:
    monkeypatch.setattr(
        "checkpoint_parts.make_optimizer", lambda options, groups, *_: Prodigy(
            [{**group, "lr": 1.0} for group in groups]
        )
    )  # fmt: skip
    (tmp_path / "run").mkdir()
    run = Run(tmp_path / "run")
    for _ in range(STEPS):
        run.step()
    run.checkpoints.save(STEPS, {"position": 12, "seed": 5, "data": "d"})
    rewritten(tmp_path / "run", tmp_path / "changed", change)
    again = Run(tmp_path / "changed")
    if says is None:
        again.resume()
        again.step()
        return
    with pytest.raises(UserError, match="there is none before it; start anew") as refusal:
        again.resume()
    assert says in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda folder: None, None),
        (put("scaler.scale", 0), "scaler.scale is 0, expected a number above 0"),
        (put("scaler.growth_interval", 1.5), "scaler.growth_interval is 1.5, expected a whole number"),
        (put("scaler.device", "cpu"), "scaler has 'device', which is not expected"),
        (put("scaler.dynamic", True), None),  # torch_npu's scaler
        (put("scaler.dynamic", 1), "scaler.dynamic is 1, expected true or false"),
        (in_state(lambda state: state.pop("scaler")), "scaler has no _growth_tracker, expected"),
    ],
)
def test_the_state_of_fp16s_scaler_is_compared_too(
    tmp_path: Path, change: Callable[[Path], object], says: str | None
) -> None:
    (tmp_path / "run").mkdir()
    run = Run(tmp_path / "run", "--mixed_precision=fp16")
    run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    run.step()
    run.checkpoints.save(STEPS, {"position": 12, "seed": 5, "data": "d"})
    rewritten(tmp_path / "run", tmp_path / "changed", change)
    again = Run(tmp_path / "changed", "--mixed_precision=fp16")
    again.accelerator.scaler = torch.amp.GradScaler("cpu")
    if says is None:
        again.resume()
        assert again.accelerator.scaler.get_scale() == 8.0
        return
    with pytest.raises(UserError) as refusal:
        again.resume()
    assert says in str(refusal.value)


class AdamW8bit(Prodigy):
    """Keeps what bitsandbytes' keeps of large parameters, which it makes by `init_state`."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        torch.optim.Optimizer.__init__(self, groups, {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0})

    def init_state(self, group: dict[str, Any], parameter: torch.Tensor, index: int, place: int) -> None:
        assert parameter is self.param_groups[index]["params"][place]
        like, blocks = torch.zeros_like(parameter, dtype=torch.uint8), torch.zeros(-(-parameter.numel() // 256))
        self.state[parameter] = {"step": 0, "state1": like, "absmax1": blocks}

    def step(self, closure: object = None) -> None:
        for index, group in enumerate(self.param_groups):
            for place, parameter in enumerate(group["params"]):
                if not self.state[parameter]:
                    self.init_state(group, parameter, index, place)
                self.state[parameter]["step"] += 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda folder: None, None),
        (tensor("0.absmax1", torch.zeros(2)), "0.absmax1 has shape (2,), expected (9,)"),
        (tensor("0.state1", torch.zeros(64, 33)), "0.state1 is torch.float32, expected torch.uint8"),
    ],
)
def test_a_state_of_8_bits_is_compared_with_what_the_package_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], object], says: str | None
) -> None:
    monkeypatch.setattr("checkpoint_parts.make_optimizer", lambda options, groups, *_: AdamW8bit(groups))
    (tmp_path / "run").mkdir()
    run = Run(tmp_path / "run")
    for _ in range(STEPS):
        run.step()
    run.checkpoints.save(STEPS, {"position": 12, "seed": 5, "data": "d"})
    rewritten(tmp_path / "run", tmp_path / "changed", change)
    again = Run(tmp_path / "changed")
    if says is None:
        again.resume()
        again.step()
        return
    with pytest.raises(UserError) as refusal:
        again.resume()
    assert says in str(refusal.value)


@pytest.mark.parametrize(
    "files",
    [3, [], {"a\0b": 3}, {"/etc/x": {}}, *({name: {"bytes": 1, "sha256": ""}} for name in ("../x", "/dev/zero"))],
)
def test_a_manifest_names_files_of_its_checkpoint_only(saved: Path, tmp_path: Path, files: object) -> None:
    shutil.copytree(saved, tmp_path / "run")
    (tmp_path / "run" / "checkpoint-3" / "manifest.json").write_text(json.dumps({"files": files}))
    with pytest.raises(UserError, match=r"checkpoint-3 is damaged \(.*resume from the one before, checkpoint-2"):
        Run(tmp_path / "run").resume()
