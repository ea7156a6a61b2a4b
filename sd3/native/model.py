"""What is trained, and how it is read and written. Full fine-tuning and LoRA differ here and nowhere else."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch.utils.checkpoint import checkpoint

from sd3.common.command_line import UserError
from sd3.common.model_files import content_hash, parts_of
from sd3.common.part_loading import load_weights
from sd3.common.trained_length import KEY
from sd3.model.lora_file import LORA_FILE
from sd3.model.lora_layers import write_lora
from sd3.native.options import block_numbers
from sd3.native.text import ENCODERS, TextEncoders, load_encoders

LORA_TARGETS = (
    "attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out",
    "attn.to_k", "attn.to_out.0", "attn.to_q", "attn.to_v",
)  # fmt: skip
CLIP_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
CLIPS = ("text_encoder", "text_encoder_2")
ADAPTER = "default"


class Denoiser(torch.nn.Module):
    """The transformer, with the text encoders before it where those are trained: one model for DDP and DeepSpeed."""

    def __init__(self, transformer: SD3Transformer2DModel, encoders: TextEncoders | None = None) -> None:
        """`encoders`: None where prompt embeds are given."""
        super().__init__()
        self.transformer = transformer
        self.encoders = encoders

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor, *text: torch.Tensor) -> torch.Tensor:
        """Prediction [B, 16, h, w] for noisy latents [B, 16, h, w] at timesteps [B] from 0 to 1000.

        `text`: prompt embeds [B, T, D] and pooled [B, P], or the three token ids where the text encoders are trained.
        """
        prompt, pooled = text if self.encoders is None else self.encoders(text)
        return self.transformer(
            hidden_states=latents, timestep=timesteps, encoder_hidden_states=prompt, pooled_projections=pooled,
            return_dict=False,
        )[0]  # fmt: skip


class Trained:
    """The model in training and its trained parts by name: `transformer`, `text_encoder`, ..."""

    def __init__(self, options: argparse.Namespace, kind: str, model: Path, dtype: torch.dtype) -> None:
        """Load from the pipeline directory `model`; what is not trained is held in `dtype`."""
        self.options = options
        self.kind = kind
        self.lora = kind == "lora"
        variant = options.variant
        # Half-precision weights in training would lose updates smaller than their last bit.
        frozen = dtype if self.lora else torch.float32
        transformer = load_weights(SD3Transformer2DModel, model / "transformer", variant, torch_dtype=frozen)
        encoders = load_encoders(model, variant, frozen) if options.train_text_encoder else None
        self.denoiser = Denoiser(transformer, encoders)
        self.parts: dict[str, torch.nn.Module] = {"transformer": transformer}
        if encoders is not None:
            names = CLIPS if self.lora else tuple(ENCODERS)
            self.parts |= {name: encoder for name in names if (encoder := getattr(encoders, name)) is not None}
        self.denoiser.requires_grad_(False)
        for name, part in self.parts.items():
            if self.lora:
                add_lora(part, options, name)
            else:
                part.requires_grad_(True)
        for part in self.parts.values():  # and not the T5 beside a LoRA, whose dropout would blur its embeds
            part.train()
        if options.gradient_checkpointing:
            self._checkpoint_activations(transformer)
        if options.compile_blocks:
            for block in transformer.transformer_blocks:
                block.compile()

    def _checkpoint_activations(self, transformer: SD3Transformer2DModel) -> None:
        blocks = transformer.transformer_blocks
        for number in block_numbers(self.options.checkpointed_blocks, len(blocks)):
            blocks[number].forward = _recomputed(blocks[number].forward)
        for name, part in self.parts.items():
            if name != "transformer":
                part.gradient_checkpointing_enable({"use_reentrant": False})

    def groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Parameter groups of the optimizer: the transformer's, then each text encoder's with settings of its own."""
        options = self.options
        own = {
            "weight_decay": options.adam_weight_decay_text_encoder,
            "lr": options.text_encoder_lr or learning_rate,
        }
        return [
            {"params": list(trainable(part).values()), **({"lr": learning_rate} if name == "transformer" else own)}
            for name, part in self.parts.items()
        ]

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Everything that is trained."""
        return (parameter for part in self.parts.values() for parameter in trainable(part).values())

    def base(self, model: Path) -> str:
        """Hash of the weights that stay as they are, of the pipeline directory `model`: no checkpoint holds them."""
        there = parts_of(model)
        stay = [name for name in ("transformer", *ENCODERS) if name in there and (self.lora or name not in self.parts)]
        return f"{content_hash(model / name for name in stay)} {self.options.variant}"

    def names(self) -> list[str]:
        """Names of the trained parameters in the order of `parameters`."""
        return [f"{part_name}.{name}" for part_name, part in self.parts.items() for name in trainable(part)]

    def write_weights(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Write what was trained where users look for it: a LoRA file, or a folder for each part.

        `dtype`: what the transformer's LoRA is cast to, None to keep it exact; the text encoders' stay in float32.
        """
        if not self.lora:
            for name, part in self.parts.items():
                part.save_pretrained(folder / name)
            return
        parts = {
            name: (part.peft_config[ADAPTER], lora_weights(part, dtype if name == "transformer" else None))
            for name, part in self.parts.items()
        }
        write_lora(folder / LORA_FILE, parts, {KEY: str(self.options.max_sequence_length)})


def trainable(part: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters of a module that are trained, by name."""
    return {name: parameter for name, parameter in part.named_parameters() if parameter.requires_grad}


def add_lora(part: torch.nn.Module, options: argparse.Namespace, name: str) -> None:
    """Add low-rank matrices (Hu et al. 2021, arXiv:2106.09685) to a part's projections, trained in float32.

    Raises:
        UserError: the transformer has not the blocks or layers that were asked for.
    """
    targets = transformer_targets(options, part) if name == "transformer" else list(CLIP_TARGETS)
    part.add_adapter(
        LoraConfig(r=options.rank, lora_alpha=options.rank, init_lora_weights="gaussian", target_modules=targets)
    )
    cast_training_params([part], dtype=torch.float32)


def transformer_targets(options: argparse.Namespace, transformer: torch.nn.Module) -> list[str]:
    """Ends of the names of the transformer's modules that get low-rank matrices; raises as `add_lora` does."""
    layers = [one.strip() for one in options.lora_layers.split(",")] if options.lora_layers else list(LORA_TARGETS)
    linear = [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    if absent := [layer for layer in layers if not any(name.endswith(f".{layer}") for name in linear)]:
        raise UserError(
            f"--lora_layers={options.lora_layers}: no block has a linear layer {', '.join(absent)}; give names such as "
            "attn.to_k."
        )
    if not options.lora_blocks:
        return layers
    blocks, count = [int(block) for block in options.lora_blocks.split(",")], len(transformer.transformer_blocks)
    if max(blocks) >= count:
        raise UserError(
            f"--lora_blocks={options.lora_blocks}: the transformer has the blocks 0 to {count - 1}; name some."
        )
    targets = [f"transformer_blocks.{block}.{layer}" for block in blocks for layer in layers]
    if not set(targets) & set(linear):  # the last block lacks some layers
        raise UserError(
            f"--lora_blocks={options.lora_blocks}: none of them has a linear layer {', '.join(layers)}; give others."
        )
    return targets


def lora_weights(part: torch.nn.Module, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """A part's low-rank matrices by name."""
    weights = get_peft_model_state_dict(part)
    return {name: weight.detach().to(dtype or weight.dtype) for name, weight in weights.items()}


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` with its activations computed again in the backward pass instead of kept."""

    def run(*arguments: Any, **keywords: Any) -> Any:  # noqa: ANN401
        return checkpoint(forward, *arguments, use_reentrant=False, **keywords)

    return run
