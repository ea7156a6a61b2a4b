"""The painter's training set: pictures of the world as latents beside their captions as the transformer reads them.

A caption is padded to 77 tokens for CLIP and to as many as 256 for T5, and most of them are padding that says the same.
The album keeps the first tokens, and of the padding a few with the number of tokens that each stands for; in attention
a key that stands for n equal ones has log n added to its scores. That is what full sequences would give if padding were
all alike, at a third of the cost.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from sd3.common.files import new_file
from sd3.common.model_sizes import CLIP_TOKENS
from sd3.tiny_world.autoencoder import as_tensor
from sd3.tiny_world.grammar import Scene, caption_of, draw_scene, forget, rare_word, with_rare_word
from sd3.tiny_world.reader import Reader, draw_length
from sd3.tiny_world.render import render

PICTURES = 28_672
WORDS = 18  # tokens of the longest caption, begin and end included
PADS = 3  # of each sequence that stand for the others
_CHUNK = 64
_EMPTY, _RARE = 0.1, 0.06  # shares of captions that are empty, for guidance, and that hold a rare word


class Album(NamedTuple):
    """N pictures; float16."""

    latents: torch.Tensor  # [N, 16, 8, 8], as the autoencoder gives their means
    prompt: torch.Tensor  # [N, 2 (WORDS + PADS), D]
    bias: torch.Tensor  # [N, 2 (WORDS + PADS)], to be added to the scores of those keys
    pooled: torch.Tensor  # [N, P]


def _thinned(sequence: torch.Tensor, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a sequence [B, T, D] the first WORDS tokens and PADS of the rest, and their biases [B, WORDS + PADS]."""
    rest = sequence.shape[1] - WORDS
    kept = sorted(rng.sample(range(WORDS, sequence.shape[1]), PADS))
    bias = torch.tensor([0.0] * WORDS + [math.log(rest / PADS)] * PADS)
    return sequence[:, [*range(WORDS), *kept]], bias.expand(len(sequence), -1)


def _caption(scene_rng: random.Random, told: str) -> str:
    chance = scene_rng.random()
    if chance < _EMPTY:
        return ""
    if chance < _EMPTY + _RARE and len(told.split()) + 5 < WORDS - 2:  # a rare word is as many tokens as letters
        return with_rare_word(told, rare_word(scene_rng))
    return told


@torch.no_grad()
def make_album(
    vae: AutoencoderKL, reader: Reader, seed: int, pictures: int = PICTURES, number: int = 0,
    hidden: Callable[[Scene], bool] = Scene.is_rare,
) -> Album:  # fmt: skip
    """Draw and encode the pictures of album `number`, none of a `hidden` scene; the same seed gives the same album."""
    parts: list[tuple[torch.Tensor, ...]] = []
    for chunk in tqdm(range(-(-pictures // _CHUNK)), "album", mininterval=1):
        rng = random.Random(f"album {seed} {number * 1_000_000 + chunk}")
        scenes = [draw_scene(rng, hidden=hidden) for _ in range(_CHUNK)]
        captions = [_caption(rng, caption_of(forget(scene, rng), rng)) for scene in scenes]
        if (longest := reader.longest(captions)) > WORDS:  # else words would be thinned out as padding
            raise ValueError(f"a caption has {longest} tokens, and an album keeps {WORDS}.")
        latents = vae.encode(as_tensor([render(scene, rng) for scene in scenes])).latent_dist.mean
        embeds, pooled = reader(captions, draw_length(rng))
        clip, t5 = (_thinned(one, rng) for one in (embeds[:, :CLIP_TOKENS], embeds[:, CLIP_TOKENS:]))
        prompt, bias = (torch.cat(both, dim=1) for both in zip(clip, t5, strict=True))
        parts.append(tuple(tensor.half() for tensor in (latents, prompt, bias, pooled)))
    return Album(*(torch.cat(part)[:pictures] for part in zip(*parts, strict=True)))


def save_album(album: Album, file: Path) -> None:
    """Write it as safetensors."""
    with new_file(file) as aside:
        save_file({name: tensor.contiguous() for name, tensor in album._asdict().items()}, aside)


def load_album(file: Path) -> Album:
    """Read what `save_album` wrote."""
    return Album(**load_file(file))
