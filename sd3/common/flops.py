"""What one forward pass costs, counted by torch's FlopCounterMode on the meta device: nothing is computed.

A multiply-add counts as two operations. Element-wise work is not counted; it is small beside the matrix products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from sd3.common import model_parts
from sd3.common.model_sizes import CLIP_TOKENS, LATENT_CHANNELS, VAE_STRIDE

if TYPE_CHECKING:
    from sd3.common.model_sizes import ModelSize


class Cost(NamedTuple):
    """Operations of one forward pass, and the number of parameters that it needs."""

    flops: int
    parameters: int


def _cost(make: Callable[[], torch.nn.Module], run: Callable[[torch.nn.Module], object]) -> Cost:
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        module = make()
        run(module)
    return Cost(counter.get_total_flops(), sum(parameter.numel() for parameter in module.parameters()))


def transformer_cost(size: ModelSize, resolution: int, text_tokens: int) -> Cost:
    """One denoising step of one picture of `resolution` pixels a side, without guidance."""
    side = resolution // VAE_STRIDE

    def run(transformer: torch.nn.Module) -> None:
        transformer(
            torch.empty(1, LATENT_CHANNELS, side, side),
            encoder_hidden_states=torch.empty(1, text_tokens, size.t5_width),
            pooled_projections=torch.empty(1, size.pooled_width),
            timestep=torch.empty(1),
        )

    return _cost(lambda: model_parts.make_transformer(size), run)


def decoder_cost(size: ModelSize, resolution: int) -> Cost:
    """Decoding the latents of one picture; the parameters are those of the whole autoencoder."""
    side = resolution // VAE_STRIDE
    return _cost(
        lambda: model_parts.make_vae(size), lambda vae: vae.decode(torch.empty(1, LATENT_CHANNELS, side, side))
    )


def encoder_cost(size: ModelSize, resolution: int) -> Cost:
    """Encoding one picture of `resolution` pixels a side; the parameters are those of the whole autoencoder."""
    return _cost(
        lambda: model_parts.make_vae(size), lambda vae: vae.encode(torch.empty(1, 3, resolution, resolution))
    )


def t5_cost(size: ModelSize, tokens: int) -> Cost:
    """Encoding one prompt, padded to `tokens`, with T5."""
    return _cost(
        lambda: model_parts.make_t5(size, rows=1), lambda encoder: encoder(torch.zeros(1, tokens, dtype=torch.long))
    )


def clip_cost(size: ModelSize) -> Cost:
    """Encoding one prompt with both CLIP encoders."""
    costs = [
        _cost(
            lambda clip=clip: model_parts.make_clip(clip),
            lambda encoder: encoder(torch.zeros(1, CLIP_TOKENS, dtype=torch.long)),
        )
        for clip in size.clips
    ]
    return Cost(sum(cost.flops for cost in costs), sum(cost.parameters for cost in costs))
