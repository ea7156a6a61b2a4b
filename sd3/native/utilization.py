"""How much of the device's peak the training reaches: operations counted from the configuration, over a table."""

from __future__ import annotations

import re

import torch
from diffusers import SD3Transformer2DModel
from torch.utils.flop_counter import FlopCounterMode

from sd3.common.model_sizes import VAE_STRIDE

# Dense matrix operations a second in fp16 and bf16, as the makers state them, by words of what the device calls itself;
# the first that fits counts. None for a slice of a device.
PEAKS = {
    "MIG": None,
    "Ascend910B1": 414e12, "Ascend910B2": 376e12, "Ascend910B3": 313e12, "Ascend910B4": 280e12,
    "A100": 312e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200 NVL": 835e12, "H200": 989e12,
}  # fmt: skip


def peak_of(device_name: str) -> float | None:
    """Peak operations a second of a device in half precision, None if it is not in the table."""
    return next((peak for words, peak in PEAKS.items() if re.search(rf"\b{words}\b", device_name, re.IGNORECASE)), None)


def work_of(
    config: dict[str, object], resolution: int, text_tokens: int, lora: bool, pictures: int = 1
) -> float:
    """Operations that training needs for a sample of `pictures` pictures of `resolution` pixels a side.

    Counted on the meta device; a multiply-add counts as two. `config`: of the transformer. The backward pass costs
    twice the forward pass; with LoRA, which leaves out the gradients of the weights, once. What gradient checkpointing
    computes again is not counted, nor are the low-rank matrices.
    """
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        transformer = SD3Transformer2DModel.from_config(config)
        side = resolution // VAE_STRIDE
        transformer(
            torch.empty(pictures, transformer.config.in_channels, side, side),
            encoder_hidden_states=torch.empty(pictures, text_tokens, transformer.config.joint_attention_dim),
            pooled_projections=torch.empty(pictures, transformer.config.pooled_projection_dim),
            timestep=torch.empty(pictures),
        )
    return float(counter.get_total_flops()) * (2 if lora else 3)


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    return "CPU" if device.type == "cpu" else getattr(torch, device.type).get_device_name(device)
