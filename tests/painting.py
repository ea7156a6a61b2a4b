"""LoRA files for the tests of inference, made on the tiny model with weights that are not zero."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

ATTENTION = ["to_k", "to_q", "to_v", "to_out.0"]
SMALL = ["--height=64", "--width=64", "--steps=4", "--device=cpu"]


def make_lora(model: Path, folder: Path, text_encoders: bool = False, rank: int = 4) -> Path:
    """A LoRA of the transformer, and of both CLIP encoders if asked for, as the training script saves it."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(model)
    layers = {}
    parts = {"transformer": ATTENTION}
    if text_encoders:
        parts |= dict.fromkeys(("text_encoder", "text_encoder_2"), ["q_proj", "k_proj", "v_proj", "out_proj"])
    for part, targets in parts.items():
        module = getattr(pipeline, part)
        # lora_B starts at zero unless asked otherwise, and a LoRA of zeros would prove nothing.
        config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights=False, target_modules=targets)
        torch.manual_seed(3)
        module.add_adapter(config)
        layers[f"{part}_lora_layers"] = get_peft_model_state_dict(module)
    StableDiffusion3Pipeline.save_lora_weights(folder, **layers)
    return folder / "pytorch_lora_weights.safetensors"
