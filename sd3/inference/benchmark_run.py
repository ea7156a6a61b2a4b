"""One measured run in a process of its own: the published loop, or ours, on the same weights, prompts and seeds."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline

from sd3.common.memory import PeakMemory, device_module
from sd3.common.pictures import Recipe, save_picture
from sd3.inference.paint import Painter, encode_prompts
from sd3.inference.sources import find_sources
from sd3.inference.weights import Weights

SUBJECTS = ("dog", "cat", "teapot", "clock", "bird", "house", "robot", "flower")
PLACES = ("on a beach", "in the snow", "on the moon", "in a city street")


@dataclasses.dataclass(frozen=True)
class Case:
    """What is painted, and how."""

    model: str
    device: str
    dtype: str
    prompts: int
    seeds: int
    steps: int
    side: int
    guidance_scale: float
    batch_size: int = 1
    compiled: bool = False

    def recipes(self) -> list[Recipe]:
        """Every prompt with every seed, as the published loop goes through them."""
        texts = [f"a {SUBJECTS[i % 8]} {PLACES[i // 8 % 4]}, picture {i}" for i in range(self.prompts)]
        common = {"steps": self.steps, "guidance_scale": self.guidance_scale, "height": self.side, "width": self.side}
        common |= {"dtype": self.dtype, "model": self.model, "model_hash": "", "negative_prompt": ""}
        return [Recipe(prompt=text, seed=seed, **common) for text in texts for seed in range(self.seeds)]


@dataclasses.dataclass(frozen=True)
class Measured:
    """Seconds of painting, from the first prompt encoded to the last file written, loading left out; peak memory in
    bytes, of the device or, on a CPU, of the process beyond what it held before the first weight."""

    seconds: float
    load_seconds: float
    peak_bytes: int
    pictures: int


def run_case(case: Case, ours: bool, folder: Path) -> Measured:
    """Paint all pictures of a case into `folder`."""
    device = torch.device(case.device)
    with PeakMemory(device) as memory:
        seconds, load_seconds = (_ours if ours else _published)(case, device, folder)
    return Measured(seconds, load_seconds, memory.peak, case.prompts * case.seeds)


def _now(device: torch.device) -> float:
    """The time when all that was asked of the device is done."""
    if module := device_module(device):
        module.synchronize()
    return time.perf_counter()


def _published(case: Case, device: torch.device, folder: Path) -> tuple[float, float]:
    """Every part on the device, every prompt encoded for every seed, one picture at a time."""
    start = _now(device)
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        case.model, torch_dtype=getattr(torch, case.dtype), local_files_only=True
    ).to(device)
    pipeline.set_progress_bar_config(disable=True)
    loaded = _now(device)
    for recipe in case.recipes():
        image = pipeline(
            prompt=recipe.prompt, num_inference_steps=recipe.steps, height=recipe.height, width=recipe.width,
            guidance_scale=recipe.guidance_scale, generator=torch.Generator("cpu").manual_seed(recipe.seed),
        ).images[0]  # fmt: skip
        image.save(folder / recipe.file_name())
    return _now(device) - loaded, loaded - start


def _ours(case: Case, device: torch.device, folder: Path) -> tuple[float, float]:
    """What the inference scripts do; loading is spread over the run, and is measured where it happens."""
    recipes = case.recipes()
    start = _now(device)
    weights = Weights(find_sources(case.model), getattr(torch, case.dtype), lora_scale=1.0)
    texts = [recipe.prompt for recipe in recipes]
    if case.guidance_scale > 1:
        texts.append("")
    embeds = encode_prompts(weights, texts, device)
    encoded = _now(device)
    painter = Painter(weights, device, compiled=case.compiled)
    loaded = _now(device)
    for first in range(0, len(recipes), case.batch_size):
        batch = recipes[first : first + case.batch_size]
        for image, recipe in zip(painter.paint(batch, embeds), batch, strict=True):
            save_picture(image, folder / recipe.file_name(), recipe, {})
    total = _now(device) - start
    load_seconds = weights.encoder_seconds + (loaded - encoded)
    return total - load_seconds, load_seconds
