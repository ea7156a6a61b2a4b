"""One training step's arithmetic: latents, noise, timesteps, prediction, loss. Nothing here waits for the device."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

from sd3.native.randomness import normal, seed_of


class Batch(NamedTuple):
    """Samples of one batch; with prior preservation B counts instance pictures, then as many class pictures."""

    mean: torch.Tensor  # [B, 16, h, w] of the latent distributions, as the VAE gives them
    logvar: torch.Tensor  # [B, 16, h, w]
    text: tuple[torch.Tensor, ...]  # prompt embeds [B, T, D] and pooled [B, P], or three token ids
    positions: list[int]  # [number of samples] in the run's stream


class Draws(NamedTuple):
    """What is random about a batch."""

    sampling: torch.Tensor  # [B, 16, h, w] standard normal, for the latents
    noise: torch.Tensor  # [B, 16, h, w] standard normal, to be added
    indices: torch.Tensor  # [B] of timesteps in the scheduler's table, on the CPU


def draw(options: argparse.Namespace, seed: int, batch: Batch, steps: int) -> Draws:
    """The random numbers of a batch, each sample's by its position; `steps`: length of the scheduler's table."""
    device, shape = batch.mean.device, tuple(batch.mean.shape[1:])
    halves = ("instance", "class") if options.with_prior_preservation else ("instance",)

    def seeds(purpose: str) -> list[int]:
        return [seed_of(seed, f"{purpose} {half}", position) for half in halves for position in batch.positions]

    densities = []
    with torch.random.fork_rng(devices=[]):
        for one in seeds("timestep"):
            torch.default_generator.manual_seed(one)
            densities.append(
                compute_density_for_timestep_sampling(
                    weighting_scheme=options.weighting_scheme, batch_size=1, logit_mean=options.logit_mean,
                    logit_std=options.logit_std, mode_scale=options.mode_scale,
                )
            )  # fmt: skip
    # A wide logit_normal rounds to 1, a strong mode leaves the interval from 0 to 1: the table has no entry there.
    indices = (torch.cat(densities) * steps).long().clamp(0, steps - 1)
    return Draws(normal(shape, seeds("sampling"), device), normal(shape, seeds("noise"), device), indices)


class FlowMatching:
    """The rectified-flow loss of SD3 (Esser et al. 2024, arXiv:2403.03206, sections 2 and 3.1)."""

    def __init__(
        self, options: argparse.Namespace, scheduler: FlowMatchEulerDiscreteScheduler, shift: float, scale: float,
        dtype: torch.dtype, device: torch.device,
    ) -> None:  # fmt: skip
        """`shift` and `scale` of the VAE's latents; `dtype`: of the transformer's input."""
        self.options = options
        self.shift, self.scale, self.dtype = shift, scale, dtype
        # The patched diffusers scripts compute in the latents' dtype. The weight 1 / sigma**2, up to 110,000, makes
        # more than the loss itself of what bfloat16 rounds off latents and noise.
        self.exact = torch.float32 if options.weighting_scheme == "sigma_sqrt" else dtype
        # One entry per timestep.
        self.timesteps = scheduler.timesteps.to(device)
        self.sigmas = scheduler.sigmas.to(device, self.exact)

    def loss(self, predict: Callable[..., torch.Tensor], batch: Batch, draws: Draws) -> torch.Tensor:
        """The loss of a batch, a float32 scalar on the device; `predict` is the Denoiser.

        With sigma s, latents x and noise n the transformer sees z = (1 - s) x + s n and predicts v. Preconditioned
        (Karras et al. 2022, arXiv:2206.00364, section 5) z - s v is compared with x, else v with n - x; the squared
        error is weighted by the scheme's function of s.
        """
        options = self.options
        latents = batch.mean + torch.exp(0.5 * batch.logvar.clamp(-30.0, 20.0)) * draws.sampling
        latents = ((latents - self.shift) * self.scale).to(self.exact)
        noise = draws.noise.to(self.exact)
        indices = draws.indices.to(latents.device, non_blocking=True)
        sigmas = self.sigmas[indices].view(-1, 1, 1, 1)
        noisy = (1.0 - sigmas) * latents + sigmas * noise
        prediction = predict(noisy.to(self.dtype), self.timesteps[indices], *batch.text)
        target = noise - latents
        if options.precondition_outputs:
            prediction = prediction * (-sigmas) + noisy
            target = latents
        weighting = compute_loss_weighting_for_sd3(weighting_scheme=options.weighting_scheme, sigmas=sigmas)
        error = weighting.float() * (prediction.float() - target.float()).square()
        if not options.with_prior_preservation:
            return error.mean()
        instance, prior = error.chunk(2)
        return instance.mean() + options.prior_loss_weight * prior.mean()
