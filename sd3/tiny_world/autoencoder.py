"""Trains the autoencoder on pictures of the world and on doodles, and measures its latents."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL

from sd3.common.model_parts import make_vae
from sd3.tiny_world.grammar import BACKGROUNDS, SHAPES, draw_scene
from sd3.tiny_world.loop import Trainer, rounded, seeded
from sd3.tiny_world.render import Pixels, doodle, render
from sd3.tiny_world.sizes import TINY_WORLD
from sd3.tiny_world.subject import draw_any_figure, draw_figure, draw_pose, ground

BATCH = 8
KL_WEIGHT = 3e-4  # a nat in each number of a latent costs as much as this much of the pixels' error


class Phase(NamedTuple):
    """A part of the training, with a learning rate of its own that ends at nothing."""

    steps: int
    learning_rate: float
    doodles: float  # share of pictures that are not of the world
    edges: float  # weight of the error of differences between neighbours
    figures: float = 0.0  # share of pictures of striped shapes, most with a face
    noise: float = 0.0  # most that is added to the latents, as a share of their spread
    anchored: float = 0.0  # weight of the change of the world's latents


# The first finds codes, the next two make edges sharp. The fourth makes codes that stand errors: a small painter's
# latents are never exact, and nothing that shows may hang on their last digits. The last one learns more of what the
# world does not have, faces, and leaves the world's latents as they are: painters can learn from those before it ends.
PHASES = (
    Phase(3000, 1.5e-3, doodles=0.5, edges=0.0),
    Phase(2400, 1.5e-3, doodles=0.4, edges=1.0),
    Phase(3200, 2.0e-3, doodles=0.3, edges=1.0),
    Phase(3000, 1.5e-3, doodles=0.15, edges=1.0, figures=0.25, noise=0.6),
    Phase(6000, 7e-4, doodles=0.1, edges=1.0, figures=0.45, noise=0.4, anchored=10.0),
)
CODED = max(number for number, phase in enumerate(PHASES) if not phase.anchored)  # after it the latents are final
_FIGURES = tuple(shape for shape in SHAPES if shape != "star")  # a striped star stays new


def as_tensor(pictures: list[Pixels]) -> torch.Tensor:
    """Pictures [64, 64, 3] of 0 to 255 as the autoencoder's input [B, 3, 64, 64] of -1 to 1."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def _batch(rng: random.Random, phase: Phase) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures [B, 3, 64, 64], and which of them are of the world [B]."""
    pictures, of_world = [], []
    for _ in range(BATCH):
        chance = rng.random()
        of_world.append(chance >= phase.doodles + phase.figures)
        if chance < phase.doodles:
            pictures.append(doodle(rng))
        elif of_world[-1]:
            pictures.append(render(draw_scene(rng), rng, loose=True))
        else:
            figure = draw_any_figure(rng, _FIGURES)
            pictures.append(draw_figure(ground(rng.choice(list(BACKGROUNDS))), draw_pose(rng), figure))
    return as_tensor(pictures), torch.tensor(of_world)


def loss_of(
    vae: AutoencoderKL, pixels: torch.Tensor, phase: Phase, generator: torch.Generator, anchor: torch.Tensor
) -> torch.Tensor:
    """Absolute and squared error of the pixels, absolute error of the differences between neighbours, and the latents'
    divergence from a standard normal (Kingma and Welling 2014, arXiv:1312.6114, appendix B); all are means over
    numbers. `anchor`: what the latents' means of the first pictures were, [up to B, 16, 8, 8]."""
    latents = vae.encode(pixels).latent_dist
    divergence = 0.5 * (latents.mean.square() + latents.var - 1 - latents.logvar).mean()
    sample = latents.sample(generator)
    if phase.noise:
        shares = phase.noise * torch.rand(len(sample), 1, 1, 1, generator=generator)
        sample = sample + shares * latents.mean.detach().std() * torch.randn(sample.shape, generator=generator)
    error = vae.decode(sample).sample - pixels
    loss = error.abs().mean() + 2 * error.square().mean() + KL_WEIGHT * divergence
    if phase.edges:
        loss = loss + phase.edges * (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean())
    if len(anchor):
        loss = loss + phase.anchored * (latents.mean[: len(anchor)] - anchor).square().mean()
    return loss


@torch.no_grad()
def _measured(vae: AutoencoderKL, seed: int, standardize: bool) -> float:
    """The mean absolute error of pictures of the world. `standardize`: write the mean and the spread of their latents
    to the configuration, as the pipeline undoes them."""
    rng = random.Random(f"latents {seed}")
    pictures = as_tensor([render(draw_scene(rng), rng, loose=True) for _ in range(256)])
    latents = vae.encode(pictures).latent_dist.mean
    if standardize:
        vae.register_to_config(
            shift_factor=round(latents.mean().item(), 4), scaling_factor=round(1 / latents.std().item(), 4)
        )
    return round(0.5 * (vae.decode(latents).sample - pictures).abs().mean().item(), 5)


def folder_of(folder: Path, number: int) -> Path:
    """Where in the work directory the result of phase `number` stands."""
    return folder / f"vae.{number}"


def train_autoencoder(folder: Path, seed: int, number: int, steps: int | None = None) -> float:
    """Do phase `number` of PHASES, in `steps` steps if given, on what the one before left in the work directory, and
    write the result there in float16.

    Returns the mean absolute error of the pixels of fresh pictures of the world, where white is 1 and black is 0.
    """
    phase = PHASES[number]
    if number:
        vae = AutoencoderKL.from_pretrained(folder_of(folder, number - 1), torch_dtype=torch.float32)
    else:
        vae = seeded(lambda: make_vae(TINY_WORLD), seed)
    before = copy.deepcopy(vae).requires_grad_(False)
    trainer = Trainer(vae, phase.learning_rate, steps or phase.steps)
    generator = torch.Generator().manual_seed(seed)

    def loss_at(step: int) -> torch.Tensor:
        rng = random.Random(f"autoencoder {seed} {number} {step}" if number else f"autoencoder {seed} {step}")
        pixels, of_world = _batch(rng, phase)
        anchor = torch.empty(0)
        if phase.anchored and of_world.any():
            pixels = torch.cat([pixels[of_world], pixels[~of_world]])
            anchor = before.encode(pixels[: int(of_world.sum())]).latent_dist.mean
        return loss_of(vae, pixels, phase, generator, anchor)

    trainer.run(loss_at, f"autoencoder, {number + 1} of {len(PHASES)}")
    trainer.settle()
    rounded([vae])
    error = _measured(vae, seed, standardize=not phase.anchored)
    vae.half().save_pretrained(folder_of(folder, number))
    return error
