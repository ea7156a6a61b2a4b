"""Pictures of --validation_prompt while training and after it, shown to the trackers."""

from __future__ import annotations

import argparse
import contextlib
import random
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sd3.native.tracking import forgiven

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import StableDiffusion3Pipeline
    from PIL import Image


@torch.no_grad()
def validate(
    options: argparse.Namespace,
    pipeline: StableDiffusion3Pipeline,
    accelerator: Accelerator,
    step_or_epoch: int,
    phase: str,
    dtype: torch.dtype,
    prompt_arguments: Mapping[str, Any],
) -> list[Image.Image]:
    """Paint --num_validation_images and give them to the trackers; the training is none the wiser.

    Parts of the pipeline keep dtype, values and mode, and the global random numbers go on as if nothing had been drawn.

    Args:
        pipeline: its parts on the device, dtypes may differ.
        step_or_epoch: where the trackers put the pictures.
        phase: the pictures' tag, "validation" or "test".
        dtype: of the arithmetic; float32 takes the parts as they are.
        prompt_arguments: `prompt`; or `prompt_embeds` and `negative_prompt_embeds` (1, tokens, width of T5) with
            `pooled_prompt_embeds` and `negative_pooled_prompt_embeds` (1, sum of CLIP widths).
    """
    device = accelerator.device
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator(device)
    if options.seed is None:
        generator.seed()
    else:
        generator.manual_seed(options.seed)
    arithmetic = torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()
    with _undisturbed_randomness(device):
        with _evaluated(pipeline), arithmetic:
            count = options.num_validation_images
            pictures = [pipeline(**prompt_arguments, generator=generator).images[0] for _ in range(count)]
        if pictures and accelerator.is_main_process:
            with forgiven(accelerator):
                for tracker in accelerator.trackers:
                    _show(tracker, phase, pictures, step_or_epoch, options.validation_prompt)
    return pictures


@contextlib.contextmanager
def _undisturbed_randomness(device: torch.device) -> Iterator[None]:
    """Random states of Python, NumPy, torch and the device afterwards as they were before."""
    python, numpy = random.getstate(), np.random.get_state()
    on_device = {"devices": []} if device.type == "cpu" else {"devices": [device], "device_type": device.type}
    try:
        with torch.random.fork_rng(**on_device):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextlib.contextmanager
def _evaluated(pipeline: StableDiffusion3Pipeline) -> Iterator[None]:
    """Modules in evaluation mode, each in its own mode again afterwards."""
    parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    modes = [(module, module.training) for part in parts for module in part.modules()]
    try:
        for part in parts:
            part.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _show(tracker: Any, phase: str, pictures: list[Image.Image], step: int, prompt: str | None) -> None:
    """Give the pictures to a tracker that takes pictures, under the tag `phase`, which the run report looks for."""
    if tracker.name == "tensorboard":
        pixels = np.stack([np.asarray(picture) for picture in pictures])
        tracker.writer.add_images(phase, pixels, step, dataformats="NHWC")
        tracker.writer.flush()
    elif tracker.name == "wandb":
        import wandb

        shown = [wandb.Image(picture, caption=f"{number}: {prompt}") for number, picture in enumerate(pictures)]
        tracker.log({phase: shown})
