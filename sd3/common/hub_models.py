"""The directory of a model that may be named by its hub name."""

from __future__ import annotations

import os
from pathlib import Path

from sd3.common.command_line import UserError
from sd3.common.model_files import check_model, parts_of
from sd3.common.weight_files import MODELS, choose_weights


def model_directory(
    name: str,
    option: str,
    revision: str | None = None,
    variant: str | None = None,
    local_files_only: bool = False,
    cache_dir: str | None = None,
) -> Path:
    """The pipeline directory `name`, or that of a hub model in the local cache, downloaded if allowed and needed.

    `option` named it, for messages; `cache_dir`: the local cache, None for the hub's own.

    Raises:
        UserError: it is neither, is incomplete or damaged, or cannot be had from the hub.
    """
    if problems := check_model(name, option):
        raise UserError(problems[0])
    if Path(name).exists():
        check_variant(Path(name), variant)
        return Path(name)
    from diffusers import StableDiffusion3Pipeline

    offline = local_files_only or os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    try:
        folder = Path(
            StableDiffusion3Pipeline.download(
                name, revision=revision, variant=variant, local_files_only=offline, cache_dir=cache_dir
            )
        )
    except (OSError, ValueError) as error:
        why = "it is not in the local cache" if offline else str(error).strip().splitlines()[0]
        raise UserError(
            f"{option}={name} is no directory here, and cannot be had from the hub ({why}); give the directory of the "
            "model, or log in with 'huggingface-cli login' if it is gated."
        ) from None
    if problems := check_model(str(folder), option):
        raise UserError(problems[0])
    check_variant(folder, variant)
    return folder


def check_variant(model: Path, variant: str | None) -> None:
    """Raise UserError where a part of a directory has no weights of the variant, such as fp16."""
    if variant is None:
        return
    parts = [part for part in parts_of(model) if part in MODELS]
    without = [part for part in parts if choose_weights(model / part, variant) is None]
    if without:
        raise UserError(
            f"--variant={variant}: {model} has no such weights for {', '.join(without)}; leave the option out."
        )
