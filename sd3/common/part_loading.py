"""Loads single parts of a pipeline directory, whatever weight files and tokenizer files it has."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

from sd3.common.load_errors import damage_as_user_error
from sd3.common.safetensors_files import safetensors_header
from sd3.common.tokenizer_files import only_tokenizer_json, tokenizer_folder
from sd3.common.weight_files import choose_weights, plain_folder


def load_weights(kind: Any, part: Path, variant: str | None = None, **settings: object) -> Any:  # noqa: ANN401
    """A part with every one of its weights, by its class's `from_pretrained`, from the files that
    sd3.common.weight_files chooses.

    Raises:
        UserError: it cannot be loaded, or lacks weights: the libraries draw those at random, and only warn.
    """
    settings["output_loading_info"] = True
    with damage_as_user_error(part):
        if by_itself(part, variant):
            model, info = kind.from_pretrained(part, variant=variant, **settings)
        else:
            with plain_folder(part, variant) as folder:
                model, info = kind.from_pretrained(folder, **settings)
            if hasattr(model, "register_to_config"):  # what is saved later must not name the temporary folder
                model.register_to_config(_name_or_path=str(part))
            else:
                model.config.name_or_path = str(part)
        _check_whole(model, info, part, variant)
    return model


def load_tokenizer(kind: Any, part: Path, **settings: object) -> Any:  # noqa: ANN401
    """A tokenizer by its class's `from_pretrained`, see sd3.common.tokenizer_files; raises as `load_weights` does."""
    with damage_as_user_error(part), tokenizer_folder(part) as folder:
        return kind.from_pretrained(folder, **settings)


def load_scheduler(part: Path, **settings: object) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler with the model's own settings; raises as `load_weights` does."""
    with damage_as_user_error(part):
        return FlowMatchEulerDiscreteScheduler.from_pretrained(part, **settings)


def _check_whole(model: Any, info: dict[str, Any], part: Path, variant: str | None) -> None:  # noqa: ANN401
    """Raise ValueError where weights are lacking, or where the file has more than the model."""
    tied = getattr(model, "_tied_weights_keys", None) or []
    lost = [key for key in info["missing_keys"] if key not in tied] + [key[0] for key in info["mismatched_keys"]]
    if lost:
        raise ValueError(f"it lacks weights, {sorted(lost)[0]} among them")
    # The libraries drop what a class has no use for. Of the transformer each weight counts: without those of dual
    # attention, or of norms that the configuration does not mention, it is another model.
    if part.name == "transformer" and (more := _names(part, variant) - model.state_dict().keys()):
        raise ValueError(f"it has weights for which the configuration has no place, {min(more)} among them")


def _names(part: Path, variant: str | None) -> set[str]:
    chosen = choose_weights(part, variant)
    files = [file for file in chosen.files if file.suffix == ".safetensors"] if chosen else []
    return {name for file in files for name in safetensors_header(file)}


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
