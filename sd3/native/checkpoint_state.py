"""What a checkpoint's state may be: names, types, ranges and shapes, compared before any of it is used.

The manifest tells a file that was changed by accident. A state that somebody wrote anew, manifest included, reaches an
optimizer whose kernels trust it: a moment of three elements makes the fused AdamW write past its end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Set
from typing import Any, NamedTuple

import torch

from sd3.native import options
from sd3.native.options import Flag, Range, flags

FORMAT = 2
Facts = dict[str, Any]


class Mismatch(Exception):
    """Something in a state is not as expected; the text says what it has and what was expected."""


class Kind(NamedTuple):
    """A kind of value, and how a sentence names it."""

    words: str
    holds: Callable[[Any], bool]


def integer(low: int, high: int) -> Kind:
    """Whole numbers in a range; true and false are none."""
    return Kind(f"a whole number from {low} to {high}", lambda value: type(value) is int and low <= value <= high)


def number(limits: Range) -> Kind:
    """Finite numbers in a range; true and false are none."""
    return Kind(f"a number {limits.words}", lambda value: is_finite(value) and limits.holds(value))


def is_finite(value: Any) -> bool:  # noqa: ANN401
    """Is it a number, and neither infinite nor too large for a float?"""
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:
        return False


def either(*values: object) -> Kind:
    """One of some values, of the same type: 1 is not true."""
    return Kind(
        " or ".join(str(value) for value in values),
        lambda value: any(type(value) is type(other) and value == other for other in values),
    )


TEXT = Kind("a text", lambda value: isinstance(value, str))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
BOOLEAN = Kind("true or false", lambda value: isinstance(value, bool))
UNSET_OR_BOOLEAN = Kind("true, false or null", lambda value: value is None or isinstance(value, bool))
COUNT = integer(0, 2**53)
FROM_ZERO, POSITIVE, BELOW_ONE, FINITE = (
    number(limits) for limits in (options.NOT_NEGATIVE, options.POSITIVE, options.BELOW_ONE, options.ANY)
)
FACTS = {
    "format": either(FORMAT), "kind": either("full", "lora"), "deepspeed": BOOLEAN, "ranks": integer(1, 2**20),
    "step": integer(1, 2**53), "position": integer(1, 2**63 - 1), "seed": integer(0, 2**32 - 1), "data": TEXT,
    "flags": OBJECT, "schedule": OBJECT,
}  # fmt: skip
# Checkpoints of earlier versions lack base and course; DeepSpeed keeps an optimizer's state itself.
OTHER_FACTS = {"base": TEXT, "course": COUNT, "optimizer": OBJECT, "scaler": OBJECT}
NEEDED_FLAGS = ("seed", "optimizer", "use_8bit_adam")  # those that a resume acts upon
SCHEDULE = {"last_epoch", "_step_count", "base_lrs", "_last_lr", "lr_lambdas"}
SCHEDULE_NOTES = {"verbose", "_get_lr_called_within_step", "_is_initial"}  # some versions of torch keep some of them
SCALER = {
    "scale": POSITIVE, "growth_factor": POSITIVE, "backoff_factor": POSITIVE, "growth_interval": integer(1, 2**53),
    "_growth_tracker": COUNT,
}  # fmt: skip
SCALER_NOTES = {"dynamic"}  # torch_npu's says whether its scale changes


def shown(value: object) -> str:
    """A value from a file, as a message may have it: short, and without control characters."""
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def expect(place: str, value: object, kind: Kind) -> None:
    """Raise Mismatch where a value is not of its kind."""
    if not kind.holds(value):
        raise Mismatch(f"{place} is {shown(value)}, expected {kind.words}")


def expect_names(place: str, found: object, needed: Set[str], allowed: Set[str] = frozenset()) -> None:
    """Raise Mismatch where an object lacks a name, or has one that is neither needed nor allowed."""
    expect(place, found, OBJECT)
    assert isinstance(found, dict)
    if lacking := sorted(needed - found.keys()):
        raise Mismatch(f"{place} has no {lacking[0]}, expected {', '.join(sorted(needed))}")
    if extra := sorted(found.keys() - needed - allowed):
        raise Mismatch(f"{place} has {shown(extra[0])}, which is not expected")


def expect_list(place: str, value: object, length: int, kind: Kind) -> None:
    """Raise Mismatch where a value is not a list of so many of a kind."""
    if not isinstance(value, list | tuple) or len(value) != length:
        raise Mismatch(f"{place} is {shown(value)}, expected a list of {length}")
    for index, entry in enumerate(value):
        expect(f"{place}[{index}]", entry, kind)


def check_facts(state: Facts, step: int) -> None:
    """Raise Mismatch where the facts of a checkpoint after optimizer step `step` are not what this engine writes."""
    expect_names("the state", state, set(FACTS), set(OTHER_FACTS))
    for name, kind in {**FACTS, **OTHER_FACTS}.items():
        if name in state:
            expect(name, state[name], kind)
    expect("step", state["step"], either(step))
    expect("position", state["position"], integer(step, 2**63 - 1))  # each step takes one sample or more
    if state["deepspeed"] == ("optimizer" in state):
        raise Mismatch(f"deepspeed is {state['deepspeed']}, expected an optimizer exactly where it is not")
    check_flags(state["kind"], state["flags"])


def check_flags(kind: str, found: Facts) -> None:
    """Raise Mismatch where the flags that a checkpoint keeps are none of the script `kind`, or not of their types."""
    known = {flag.name: flag for flag in flags(kind)}
    expect_names("flags", found, set(NEEDED_FLAGS), set(known))
    for name, value in found.items():
        expect(f"flags.{name}", value, _kind_of(known[name]))


def _kind_of(flag: Flag) -> Kind:
    """The values that a flag can have."""
    if flag.choices:
        return either(*flag.choices, *([None] if flag.default is None else []))
    if isinstance(flag.default, bool):
        return BOOLEAN
    kind = TEXT
    if flag.kind in (int, float):
        words, fits = flag.range or options.ANY
        types = (int,) if flag.kind is int else (int, float)
        kind = Kind(
            f"a{' whole' if flag.kind is int else ''} number {words}",
            lambda value: type(value) in types and is_finite(value) and fits(value),
        )
    if flag.default is None:
        return Kind(f"null or {kind.words}", lambda value: value is None or kind.holds(value))
    return kind


def check_schedule(found: Facts, groups: int, step: int) -> None:
    """Raise Mismatch where the state of a LambdaLR over so many parameter groups is not one after `step` steps.

    Steps that fp16 skipped for an overflow are not counted by it.
    """
    expect_names("schedule", found, SCHEDULE, SCHEDULE_NOTES)
    expect("schedule.last_epoch", found["last_epoch"], integer(0, step))
    expect("schedule._step_count", found["_step_count"], either(found["last_epoch"] + 1))
    for name in ("base_lrs", "_last_lr"):
        expect_list(f"schedule.{name}", found[name], groups, FROM_ZERO)
    expect_list("schedule.lr_lambdas", found["lr_lambdas"], groups, either(None))
    for name in SCHEDULE_NOTES & found.keys():
        expect(f"schedule.{name}", found[name], BOOLEAN)


def check_scaler(found: Facts) -> None:
    """Raise Mismatch where a state is not one of torch's GradScaler, or torch_npu's."""
    expect_names("scaler", found, set(SCALER), SCALER_NOTES)
    for name, kind in SCALER.items():
        expect(f"scaler.{name}", found[name], kind)
    for name in SCALER_NOTES & found.keys():
        expect(f"scaler.{name}", found[name], BOOLEAN)


def check_tensor(name: str, found: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise Mismatch where a tensor has another shape or dtype."""
    if tuple(found.shape) != shape:
        raise Mismatch(f"{name} has shape {shown(tuple(found.shape))}, expected {shape}")
    if found.dtype != dtype:
        raise Mismatch(f"{name} is {found.dtype}, expected {dtype}")
