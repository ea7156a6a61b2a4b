"""Loads single parts of a pipeline directory, whatever weight files and tokenizer files it has."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline

from sd3.common.tokenizer_files import only_tokenizer_json, tokenizer_folder
from sd3.common.weight_files import choose_weights, plain_folder


def load_weights(kind: Any, part: Path, variant: str | None = None, **settings: object) -> Any:  # noqa: ANN401
    """A part with weights by its class's `from_pretrained`, from the files that sd3.common.weight_files chooses."""
    if by_itself(part, variant):
        return kind.from_pretrained(part, variant=variant, **settings)
    with plain_folder(part, variant) as folder:
        loaded = kind.from_pretrained(folder, **settings)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    if hasattr(model, "register_to_config"):  # what is saved later must not name the temporary folder
        model.register_to_config(_name_or_path=str(part))
    else:
        model.config.name_or_path = str(part)
    return loaded


def load_tokenizer(kind: Any, part: Path, **settings: object) -> Any:  # noqa: ANN401
    """A tokenizer by its class's `from_pretrained`; see sd3.common.tokenizer_files."""
    with tokenizer_folder(part) as folder:
        return kind.from_pretrained(folder, **settings)


def by_itself(part: Path, variant: str | None = None) -> bool:
    """Does `from_pretrained(part, variant=variant)` take the chosen files? True where there is nothing to choose."""
    if part.name.startswith("tokenizer"):
        return not only_tokenizer_json(part)
    chosen = choose_weights(part, variant)
    return chosen is None or (chosen.expected and chosen.variant == variant)


def joint_attention_dim(transformer: Path) -> int:
    """Width of the prompt embeds that the transformer reads, from its configuration: T5's, or what stands for it."""
    return json.loads((transformer / "config.json").read_text(encoding="utf-8"))["joint_attention_dim"]


def tokens_without_t5(t5_tokens: int, clip_tokens: int) -> int:
    """How many zero vectors stand for T5's output where a model has no T5; `t5_tokens`: what T5 would have read.

    It depends on the version of diffusers, at first as many as CLIP reads, so its own function is asked.
    """
    config = SimpleNamespace(joint_attention_dim=1)
    pipeline = SimpleNamespace(
        text_encoder_3=None, tokenizer_max_length=clip_tokens, transformer=SimpleNamespace(config=config)
    )
    zeros = StableDiffusion3Pipeline._get_t5_prompt_embeds(
        pipeline, "", max_sequence_length=t5_tokens, device="cpu", dtype=torch.float32
    )
    return zeros.shape[1]
