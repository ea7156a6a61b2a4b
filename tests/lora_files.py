"""LoRA files in every layout that others write, on a tiny model shaped as SD3.5 medium, and what they should do."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sd3.common.model_sizes import SIZES
from sd3.common.tiny_sd3 import make_tiny_sd3
from sd3.inference.sources import find_sources
from sd3.inference.weights import Weights

ATTENTION = ("attn.to_q", "attn.to_out.0", "attn.add_k_proj", "attn2.to_q", "attn2.to_out.0")
CLIP = "text_model.encoder.layers"
# Two blocks, the last of which has no second attention; all kinds of modules, in the order of no one.
MODULES = {
    "transformer": (
        *(f"transformer_blocks.0.{name}" for name in ATTENTION), "transformer_blocks.1.attn.to_q",
        "transformer_blocks.1.attn.to_k", "transformer_blocks.0.ff.net.0.proj", "proj_out", "norm_out.linear",
    ),
    "text_encoder": (f"{CLIP}.0.self_attn.q_proj", f"{CLIP}.1.self_attn.out_proj", f"{CLIP}.1.mlp.fc1"),
    "text_encoder_2": (f"{CLIP}.0.self_attn.q_proj", f"{CLIP}.0.self_attn.v_proj"),
}  # fmt: skip
WEIGHTS = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
}
Name = tuple[str, str]


def make_sd35_like(folder: Path) -> Path:
    """A tiny pipeline with a second attention in its first block and normalized queries and keys."""
    size = dataclasses.replace(SIZES["tiny"], qk_norm="rms_norm", dual_layers=(0,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "tiny", size)
        make_tiny_sd3(folder)
    return folder


def names(*parts: str) -> list[Name]:
    return [(part, module) for part in parts or MODULES for module in MODULES[part]]


def pairs(model: Path, ranks: Mapping[Name, int], seed: int = 0) -> dict[Name, tuple[torch.Tensor, torch.Tensor]]:
    """A and B of these modules, strong enough to be seen."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for (part, module), rank in ranks.items():
        rows, columns = load_file(model / part / WEIGHTS[part])[f"{module}.weight"].shape
        down = torch.randn(rank, columns, generator=generator) / columns**0.5
        found[part, module] = down, torch.randn(rows, rank, generator=generator) / 4
    return found


def write(file: Path, tensors: Mapping[str, torch.Tensor], settings: object = None) -> Path:
    header = {"format": "pt"}
    if settings is not None:
        header["lora_adapter_metadata"] = settings if isinstance(settings, str) else json.dumps(settings)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file, metadata=header)
    return file


def spelt(matrices: Mapping[Name, tuple[torch.Tensor, torch.Tensor]], form: str = "{part}.{module}.lora_{side}.weight"):
    """The tensors of a file by their keys; `form` may use part, module, side (A or B) and way (down or up)."""
    return {
        form.format(part=part, module=module, side="AB"[i], way=("down", "up")[i]): pair[i]
        for (part, module), pair in matrices.items()
        for i in (1, 0)
    }


def merged(
    model: Path, folder: Path, matrices: Mapping[Name, tuple[torch.Tensor, torch.Tensor]], scales: Mapping[Name, float]
) -> Path:
    """The pipeline with the LoRA added to its weights by hand."""
    shutil.copytree(model, folder)
    for part in {part for part, _ in matrices}:
        file = folder / part / WEIGHTS[part]
        weights = {key: weight.double() for key, weight in load_file(file).items()}
        for (own, module), (down, up) in matrices.items():
            if own == part:
                weights[f"{module}.weight"] += scales[own, module] * up.double() @ down.double()
        save_file({key: weight.float() for key, weight in weights.items()}, file, metadata={"format": "pt"})
    return folder


@torch.no_grad()
def outputs(model: Path, lora: Path | str = "", scale: float = 1.0) -> dict[str, torch.Tensor]:
    """What transformer and CLIP encoders make of the same input, loaded as for generation."""
    weights = Weights(find_sources(str(model), str(lora)), torch.float32, scale)
    found = {"transformer": transformer_output(weights.transformer())}
    for part in ("text_encoder", "text_encoder_2"):
        encoder = weights.text_encoder(part, torch.device("cpu"))[1]
        states = encoder(torch.arange(2, 79)[None], output_hidden_states=True)
        found[part] = torch.cat([states.text_embeds.flatten(), states.hidden_states[-2].flatten()])
    return found


@torch.no_grad()
def transformer_output(transformer: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    config = transformer.config
    return transformer(
        torch.randn(2, 16, 8, 8, generator=generator), timestep=torch.tensor([100.0, 700.0]),
        encoder_hidden_states=torch.randn(2, 9, config.joint_attention_dim, generator=generator),
        pooled_projections=torch.randn(2, config.pooled_projection_dim, generator=generator),
    ).sample  # fmt: skip
