"""LoRA as layers of a model that generates, and as the file that a training run writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from sd3.model.lora_settings import SETTINGS_KEY, LoraError

if TYPE_CHECKING:
    from peft import LoraConfig

    from sd3.model.lora_file import LowRank

# What is written of PEFT's settings: what strength and modules follow from, and every version of PEFT takes.
WRITTEN = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_rslora", "use_dora", "bias")


class LoraLinear(torch.nn.Module):
    """A linear layer with low-rank matrices beside it: W x + b + s B A x, rounded as PEFT's layer rounds it.

    PEFT's own finds ranks and alphas by patterns, each of its versions in another way; here every layer has its own.
    """

    def __init__(self, base_layer: torch.nn.Linear, down: torch.Tensor, up: torch.Tensor, scale: float) -> None:
        """`down`: A [rank, inputs]; `up`: B [outputs, rank]; both are cast to the base layer's dtype."""
        super().__init__()
        self.base_layer = base_layer
        self.lora_A, self.lora_B = (_linear(matrix.to(base_layer.weight)) for matrix in (down, up))
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., inputs] to [..., outputs]."""
        return self.base_layer(x) + self.lora_B(self.lora_A(x)) * self.scale


def _linear(weight: torch.Tensor) -> torch.nn.Linear:
    """A layer with this weight [outputs, inputs], for which no random numbers are drawn."""
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = torch.nn.Parameter(weight)
    return layer


def add_lora(
    model: torch.nn.Module, modules: Mapping[str, LowRank], tensors: Mapping[str, torch.Tensor], scale: float = 1.0
) -> None:
    """Put low-rank matrices beside linear layers of a model.

    Args:
        model: a part of the pipeline.
        modules: what its modules get, by their names.
        tensors: the matrices by their keys in the file.
        scale: factor on the strength that the file states.

    Raises:
        LoraError: the model has no such linear layer.
    """
    layers = dict(model.named_modules())
    for name, pair in modules.items():
        layer, down, up = layers.get(name), tensors[pair.down], tensors[pair.up]
        shape = (up.shape[0], down.shape[1])
        if not isinstance(layer, torch.nn.Linear) or tuple(layer.weight.shape) != shape:
            raise LoraError(
                f"was trained for another model: there is no linear layer {name} of {shape[1]} inputs and {shape[0]} "
                "outputs; give the model it was trained on."
            )
        parent, _, last = name.rpartition(".")
        setattr(layers[parent], last, LoraLinear(layer, down, up, pair.scale * scale))


def write_lora(
    file: Path, parts: Mapping[str, tuple[LoraConfig, Mapping[str, torch.Tensor]]], header: Mapping[str, str]
) -> None:
    """Write a LoRA as diffusers does from 0.34 on, with the strength in the safetensors header; the folder is made.

    `parts`: for each part of the pipeline the settings it was trained with, and its matrices by PEFT's names.
    `header`: what the safetensors header states besides.

    Raises:
        OSError, SafetensorError: it cannot be written.
    """
    settings, tensors = {}, {}
    for part, (config, matrices) in parts.items():
        settings |= {f"{part}.{name}": _as_json(value) for name, value in config.to_dict().items() if name in WRITTEN}
        tensors |= {f"{part}.{name}": matrix.contiguous() for name, matrix in matrices.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    stated = {SETTINGS_KEY: json.dumps(settings, indent=2, sort_keys=True)}
    save_file(tensors, file, metadata={"format": "pt", **header, **stated})


def _as_json(value: object) -> object:
    """PEFT holds the names of modules as a set."""
    return sorted(value) if isinstance(value, set) else value
