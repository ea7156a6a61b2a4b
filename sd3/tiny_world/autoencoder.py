"""Trains the autoencoder on pictures of the world and on doodles, and measures its latents."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from sd3.common.model_parts import make_vae
from sd3.tiny_world.grammar import draw_scene
from sd3.tiny_world.loop import Trainer, rounded, seeded
from sd3.tiny_world.render import Pixels, doodle, render
from sd3.tiny_world.sizes import TINY_WORLD

STEPS, BATCH, LEARNING_RATE = 3000, 8, 1.5e-3
KL_WEIGHT = 3e-4  # a nat in each number of a latent costs as much as this much of the pixels' error
_DOODLES = 0.5


def as_tensor(pictures: list[Pixels]) -> torch.Tensor:
    """Pictures [64, 64, 3] of 0 to 255 as the autoencoder's input [B, 3, 64, 64] of -1 to 1."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def _batch(seed: int, step: int) -> torch.Tensor:
    rng = random.Random(f"autoencoder {seed} {step}")
    pictures = [doodle(rng) if rng.random() < _DOODLES else render(draw_scene(rng), rng) for _ in range(BATCH)]
    return as_tensor(pictures)


def loss_of(vae: AutoencoderKL, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Absolute and squared error of the pixels, and the latents' divergence from a standard normal (Kingma and Welling
    2014, arXiv:1312.6114, appendix B); all are means over numbers."""
    latents = vae.encode(pixels).latent_dist
    decoded = vae.decode(latents.sample(generator)).sample
    divergence = 0.5 * (latents.mean.square() + latents.var - 1 - latents.logvar).mean()
    error = decoded - pixels
    return error.abs().mean() + 2 * error.square().mean() + KL_WEIGHT * divergence


@torch.no_grad()
def _standardize(vae: AutoencoderKL, seed: int) -> None:
    """Write the mean and the spread of the world's latents to the configuration, as the pipeline undoes them."""
    rng = random.Random(f"latents {seed}")
    pictures = as_tensor([render(draw_scene(rng), rng) for _ in range(256)])
    latents = vae.encode(pictures).latent_dist.mean
    vae.register_to_config(
        shift_factor=round(latents.mean().item(), 4), scaling_factor=round(1 / latents.std().item(), 4)
    )


def train_autoencoder(folder: Path, seed: int, steps: int = STEPS) -> AutoencoderKL:
    """Train one and write it to `folder` in float16; the one returned has those weights in float32, frozen."""
    vae = seeded(lambda: make_vae(TINY_WORLD), seed)
    trainer = Trainer(vae, LEARNING_RATE, steps)
    generator = torch.Generator().manual_seed(seed)
    trainer.run(lambda step: loss_of(vae, _batch(seed, step), generator), "autoencoder")
    trainer.settle()
    rounded([vae])
    _standardize(vae, seed)
    vae.half().save_pretrained(folder)
    return vae.float()
