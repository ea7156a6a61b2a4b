"""What a LoRA file states of its strength: settings of PEFT, as diffusers and PEFT itself write them.

diffusers from 0.34 on writes them into the safetensors header, under the name of each part of the pipeline
("transformer.r": 16); PEFT writes them to adapter_config.json.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import regex  # as `re`, with a time limit; it comes with transformers

if TYPE_CHECKING:
    import torch

SETTINGS_KEY = "lora_adapter_metadata"
# Settings that make more of an adapter than s B A, if they are not empty.
UNSUPPORTED = (
    "use_dora", "use_qalora", "lora_bias", "layer_replication", "modules_to_save", "target_parameters",
    "trainable_token_indices", "alora_invocation_tokens",
)  # fmt: skip
# These only say where training began; others, such as pissa, also took something off the model's own weights.
PLAIN_BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal")
PATTERN_SECONDS = 1.0  # a pattern takes microseconds
AS_TRAINED = "give the file as it was trained"
Value = TypeVar("Value", int, float)


class LoraError(ValueError):
    """A LoRA file that cannot be used; the text goes behind the file's name and ends with what to do."""


@dataclass(frozen=True)
class LoraSettings:
    """Rank and alpha of one part's modules as stated, None where they are not.

    A pattern is a regular expression for the end of a module's name; the first that fits counts, as in PEFT.
    """

    part: str
    stated: bool = False
    rank: int | None = None
    alpha: float | None = None
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    rank_stabilized: bool = False

    def scale(self, module: str, rank: int, tensor: torch.Tensor | None) -> float:
        """How strongly a module's B A counts.

        Args:
            module: its name in the part.
            rank: that of its matrices.
            tensor: alpha as a tensor of the file states it [], if one does.

        Raises:
            LoraError: what is stated contradicts the matrices or itself, or does not suffice.
        """
        stated = self._first_match(self.ranks, module, self.rank)
        if stated is not None and stated != rank:
            raise LoraError(f"states rank {stated} for {module}, whose matrices have rank {rank}; {AS_TRAINED}.")
        alpha = self._alpha(module, tensor)
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)

    def _alpha(self, module: str, tensor: torch.Tensor | None) -> float | None:
        """Alpha of a module; None where neither the settings nor a tensor state any."""
        alpha = self._first_match(self.alphas, module, self.alpha)
        if tensor is None:
            if alpha is None and self.stated:
                raise LoraError(f"has settings without lora_alpha, so the strength of {module} is open; {AS_TRAINED}.")
            return alpha
        value = tensor.double().item()
        if not math.isfinite(value):
            raise LoraError(f"is damaged: alpha of {module} is {value}; train or copy it again.")
        # The tensor may have been rounded when the file was converted to a shorter dtype.
        if alpha is not None and tensor.double().new_tensor(alpha).to(tensor.dtype).double().item() != value:
            raise LoraError(f"states alpha {alpha:g} for {module} and has a tensor of {value:g}; {AS_TRAINED}.")
        return value if alpha is None else alpha

    def _first_match(self, patterns: Mapping[str, Value], module: str, default: Value | None) -> Value | None:
        names = (module, f"{self.part}.{module}")  # PEFT saw the second where the whole pipeline was its model
        return next((value for key, value in patterns.items() if any(_fits(key, name) for name in names)), default)


def parse_settings(text: str, where: str, parts: Sequence[str], known: Sequence[str]) -> dict[str, LoraSettings]:
    """The settings of each of `parts`.

    Args:
        text: JSON.
        where: what it stands in, for a message.
        parts: those that the file has matrices for.
        known: names of parts that settings may begin with; where none does, all are those of the only part.

    Raises:
        LoraError: they are not settings, or of an adapter that is more than a LoRA.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise LoraError(f"cannot be used: {where} is not a JSON object; {AS_TRAINED}.")
    by_part = {part: {k[len(part) + 1 :]: v for k, v in found.items() if k.startswith(f"{part}.")} for part in known}
    if found and not any(by_part.values()):
        if len(parts) > 1:
            raise LoraError(f"cannot be used: {where} does not say which part it is for; {AS_TRAINED}.")
        by_part[parts[0]] = found
    return {part: _settings_of(part, by_part[part], where) for part in parts}


def _settings_of(part: str, found: Mapping[str, Any], where: str) -> LoraSettings:
    if not found:
        return LoraSettings(part)
    if (kind := found.get("peft_type") or "LORA") != "LORA":
        raise LoraError(f"is not a LoRA: {where} says {kind}; give a LoRA.")
    for name in UNSUPPORTED:
        if found.get(name):
            raise LoraError(f"is not a plain LoRA: {where} has {name}, which is not supported; train it without.")
    if (beginning := found.get("init_lora_weights")) not in PLAIN_BEGINNINGS:
        raise LoraError(
            f"changes the model's own weights: {where} has init_lora_weights {beginning}; convert it to a plain LoRA."
        )

    def number(name: str, value: object, kind: type) -> Any:  # noqa: ANN401
        good = isinstance(value, int | float) and not isinstance(value, bool) and -1e9 < value < 1e9
        if not good or (kind is int and (value != int(value) or value < 1)):
            expected = "a whole number from 1 on" if kind is int else "a number"
            raise LoraError(f"cannot be used: {where} has {name} {value!r}, expected {expected}; {AS_TRAINED}.")
        return kind(value)

    def patterns(name: str, kind: type) -> dict[str, Any]:
        given = found.get(name) or {}
        if not isinstance(given, dict) or not all(map(_is_pattern, given)):
            raise LoraError(f"cannot be used: {where} has {name} {given!r}, expected names with numbers; {AS_TRAINED}.")
        return {key: number(name, value, kind) for key, value in given.items()}

    return LoraSettings(
        part, True,
        rank=None if found.get("r") is None else number("r", found["r"], int),
        alpha=None if found.get("lora_alpha") is None else number("lora_alpha", found["lora_alpha"], float),
        ranks=patterns("rank_pattern", int), alphas=patterns("alpha_pattern", float),
        rank_stabilized=bool(found.get("use_rslora")),
    )  # fmt: skip


def _is_pattern(text: str) -> bool:
    try:
        regex.compile(rf"(.*\.)?({text})$")
    except regex.error:
        return False
    return True


def _fits(pattern: str, name: str) -> bool:
    """Whether a pattern of PEFT's fits the end of a name; one that takes for ever is refused."""
    try:
        return bool(regex.match(rf"(.*\.)?({pattern})$", name, timeout=PATTERN_SECONDS))
    except TimeoutError:
        raise LoraError(f"cannot be used: its pattern {pattern!r:.80} does not come to an end; {AS_TRAINED}.") from None
