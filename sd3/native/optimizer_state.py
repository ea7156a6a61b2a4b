"""The state of an optimizer as a checkpoint keeps it: packed, compared with the optimizer that is to get it, unpacked.

A kernel trusts what it is given. So names, shapes and dtypes have to be those that the optimizer itself would have made
for its parameters, and every setting has to be in its range.
"""

from __future__ import annotations

from typing import Any

import torch

from sd3.native.checkpoint_state import (
    BELOW_ONE,
    BOOLEAN,
    COUNT,
    FINITE,
    FROM_ZERO,
    OBJECT,
    POSITIVE,
    UNSET_OR_BOOLEAN,
    Kind,
    Mismatch,
    check_tensor,
    either,
    expect,
    expect_list,
    expect_names,
    integer,
    shown,
)  # fmt: skip

Tensors = dict[str, torch.Tensor]
Packed = dict[str, Any]  # `state`: what is not a tensor, by name; `groups`: the parameter groups
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]  # shape and dtype of a state's tensors by name
NEEDED = {"params", "lr", "initial_lr", "betas", "eps", "weight_decay"}
# What AdamW has beside them, depending on its version and the device. None of our flags sets the first five.
ADAMW = {
    "amsgrad": either(False), "maximize": either(False), "capturable": either(False), "differentiable": either(False),
    "decoupled_weight_decay": either(True), "foreach": UNSET_OR_BOOLEAN, "fused": UNSET_OR_BOOLEAN,
}  # fmt: skip
PRODIGY_AFTER_A_STEP = {"d_denom", "d_hat"}
SETTINGS = {
    **ADAMW, "lr": FROM_ZERO, "initial_lr": FROM_ZERO, "eps": FROM_ZERO, "weight_decay": FROM_ZERO,
    "beta3": Kind(f"null or {BELOW_ONE.words}", lambda value: value is None or BELOW_ONE.holds(value)),
    "d": POSITIVE, "d0": POSITIVE, "d_max": POSITIVE, "d_coef": POSITIVE, "d_numerator": FINITE, "d_denom": FINITE,
    "d_hat": FINITE, "k": COUNT, "decouple": BOOLEAN, "use_bias_correction": BOOLEAN, "safeguard_warmup": BOOLEAN,
}  # fmt: skip


def pack(state: dict[str, Any]) -> tuple[Tensors, Packed]:
    """An optimizer's state_dict as tensors by name, and the rest as JSON can hold it."""
    tensors, rest = {}, {}
    for number, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{number}.{name}"] = value.detach().cpu().contiguous()
            else:
                rest[f"{number}.{name}"] = value
    return tensors, {"state": rest, "groups": state["param_groups"]}


def unpack(tensors: Tensors, packed: Packed) -> dict[str, Any]:
    """What `pack` was given."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **packed["state"]}.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = value
    groups = [{k: tuple(v) if k == "betas" else v for k, v in group.items()} for group in packed["groups"]]
    return {"state": state, "param_groups": groups}


def check_groups(packed: object, optimizer: torch.optim.Optimizer, base_rates: list[float]) -> None:
    """Raise Mismatch where the parameter groups are not of this optimizer, or have not these base learning rates."""
    expect_names("optimizer", packed, {"state", "groups"})
    assert isinstance(packed, dict)
    expect("optimizer.state", packed["state"], OBJECT)
    own = optimizer.state_dict()["param_groups"]
    expect_list("optimizer.groups", packed["groups"], len(own), OBJECT)
    for index, (group, mine) in enumerate(zip(packed["groups"], own, strict=True)):
        _check_group(f"optimizer.groups[{index}]", group, mine)
        expect(f"optimizer.groups[{index}].initial_lr", group["initial_lr"], either(base_rates[index]))
    _check_kernels(packed["groups"], optimizer)


def _check_group(place: str, group: dict[str, Any], mine: dict[str, Any]) -> None:
    prodigy = "d" in mine
    needed = set(mine) - PRODIGY_AFTER_A_STEP if prodigy else NEEDED & set(mine)
    expect_names(place, group, needed, PRODIGY_AFTER_A_STEP if prodigy else {*ADAMW, *mine})
    for name, value in group.items():
        if name == "betas":
            expect_list(f"{place}.betas", value, 2, BELOW_ONE)
        elif name == "params":
            if value != mine["params"] or not all(type(number) is int for number in value):
                raise Mismatch(f"{place}.params is {shown(value)}, expected {shown(mine['params'])}")
        else:
            expect(f"{place}.{name}", value, SETTINGS.get(name) or either(mine[name]))


def _check_kernels(groups: list[dict[str, Any]], optimizer: torch.optim.Optimizer) -> None:
    """Raise Mismatch where a group asks for a way of computing that is not there, or for two."""
    for index, (group, mine) in enumerate(zip(groups, optimizer.param_groups, strict=True)):
        if group.get("foreach") and group.get("fused"):
            raise Mismatch(f"optimizer.groups[{index}] has foreach and fused, expected one of them")
        if group.get("fused") and "fused" in mine and not mine["fused"]:
            try:
                torch.optim.AdamW([torch.nn.Parameter(torch.zeros_like(mine["params"][0]))], fused=True)
            except RuntimeError:
                device = mine["params"][0].device.type
                raise Mismatch(f"optimizer.groups[{index}].fused is True, which AdamW cannot be on {device}") from None
        # Prodigy estimates one step size for all that it trains.
        if "d" in mine and group["lr"] != groups[0]["lr"]:
            raise Mismatch(f"optimizer.groups[{index}].lr is {group['lr']}, expected that of the first group")


def check_moments(tensors: Tensors, packed: Packed, optimizer: torch.optim.Optimizer, steps: int, last: int) -> None:
    """Raise Mismatch where what is kept for each parameter is not what `optimizer` would have made for it.

    `steps`: how often the optimizer has stepped, fp16's skipped steps not counted; before the first it keeps nothing.
    `last`: the optimizer step of the checkpoint.
    """
    found: dict[str, Any] = {**tensors, **packed["state"]}
    if twice := sorted(tensors.keys() & packed["state"].keys()):
        raise Mismatch(f"{twice[0]} is there twice, as a tensor and as a number")
    if not found and steps == 0:
        return
    groups = optimizer.param_groups
    places = [(index, place) for index, group in enumerate(groups) for place in range(len(group["params"]))]
    for number, place in enumerate(places):  # as an optimizer's state_dict numbers its parameters
        for name, layout in _layout(optimizer, *place).items():
            key = f"{number}.{name}"
            if key not in found:
                raise Mismatch(f"{key} is missing")
            _check_value(key, found.pop(key), layout, last)
    if found:
        raise Mismatch(f"{shown(min(found))} belongs to no parameter")


def _check_value(key: str, value: object, layout: tuple[tuple[int, ...], torch.dtype], last: int) -> None:
    if key.endswith(".step"):
        if isinstance(value, torch.Tensor):
            check_tensor(key, value, *layout)
            value = int(value) if value.isfinite() and value == value.trunc() else value.item()
        expect(key, value, integer(0, last))  # fused kernels count back a step that fp16 had them skip, the first too
    elif not isinstance(value, torch.Tensor):
        raise Mismatch(f"{key} is {shown(value)}, expected a tensor")
    elif key.endswith(".p0") and value.dim() == 0:  # Prodigy's, of a parameter that began as zeros
        check_tensor(key, value, (), layout[1])
    else:
        check_tensor(key, value, *layout)


def _layout(optimizer: torch.optim.Optimizer, group: int, place: int) -> Layout:
    """Shape and dtype of what an optimizer keeps for the parameter at a place of a group."""
    step: Layout = {"step": ((), torch.float32)}
    settings = optimizer.param_groups[group]
    parameter = settings["params"][place]
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    if hasattr(inner, "init_state"):
        # bitsandbytes, whose blocks differ in size between its versions: it is asked.
        inner.init_state(inner.param_groups[group], parameter, group, place)
        made = inner.state.pop(parameter).items()
        return step | {
            name: (tuple(value.shape), value.dtype) for name, value in made if isinstance(value, torch.Tensor)
        }
    like = (tuple(parameter.shape), parameter.dtype)
    moments: Layout = {**step, "exp_avg": like, "exp_avg_sq": like}
    if "d" not in settings:
        return moments
    sliced = ((-(-parameter.numel() // settings.get("slice_p", 1)),), parameter.dtype)
    return {**moments, "s": sliced, "p0": sliced}


def complete(packed: Packed, optimizer: torch.optim.Optimizer) -> Packed:
    """`packed` with the settings of this optimizer's version and device: those it lacks added, others left out."""
    kept = PRODIGY_AFTER_A_STEP
    groups = [
        {**mine, **{name: value for name, value in group.items() if name in mine or name in kept}}
        for group, mine in zip(packed["groups"], optimizer.state_dict()["param_groups"], strict=True)
    ]
    return {**packed, "groups": groups}
