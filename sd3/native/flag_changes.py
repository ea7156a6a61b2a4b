"""Flags that differ between a checkpoint and the run that goes on from it: nobody's change passes without a word."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sd3.common.command_line import UserError
from sd3.native.options import public

# They do not touch what is computed, or are compared in other ways: the model by the checkpoint's tensors and FACTS,
# pictures, captions and steps by FACTS.
FREE = {
    "pretrained_model_name_or_path", "revision", "variant", "cache_dir", "instance_data_dir", "dataset_name",
    "dataset_config_name", "image_column", "caption_column", "class_data_dir", "num_class_images", "sample_batch_size",
    "prior_generation_precision", "instance_prompt", "class_prompt", "repeats", "resolution", "center_crop",
    "random_flip", "dataloader_num_workers", "cache_latents", "num_train_epochs", "max_train_steps", "local_rank",
    "output_dir", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "upcast_before_saving",
    "validation_prompt", "num_validation_images", "validation_epochs", "report_to", "logging_dir", "push_to_hub",
    "hub_model_id", "precompute_dir", "keep_every", "log_every", "profile", "continue_on_nonfinite",
}  # fmt: skip
# They lie in the optimizer's state, which the checkpoint brings back; the seed in its place in the run.
HELD = {
    "seed", "learning_rate", "text_encoder_lr", "scale_lr", "adam_beta1", "adam_beta2", "adam_weight_decay",
    "adam_weight_decay_text_encoder", "adam_epsilon", "adamw", "prodigy_beta3", "prodigy_decouple",
    "prodigy_use_bias_correction", "prodigy_safeguard_warmup",
}  # fmt: skip
FIXED = {"optimizer", "use_8bit_adam"}
# What a run is told by beside its flags, see `facts_of`; where one has changed, a sentence begins like this.
FACTS = {
    "data": "The data are not those of",
    "base": "The weights that are not trained are not those of",
    "course": "The learning rate has another course, of {now} steps, than in",
}


def remembered(options: argparse.Namespace) -> dict[str, Any]:
    """The flags that a checkpoint keeps, to compare with those of a later run."""
    return {name: value for name, value in public(options).items() if name not in FREE}


def differences(folder: Path, before: dict[str, Any], options: argparse.Namespace) -> list[str]:
    """A sentence for each flag that is not as it was when the checkpoint `folder` was written.

    Raises:
        UserError: one of them cannot change.
    """
    now = remembered(options)
    changed = [name for name in now if name in before and now[name] != before[name]]
    if name := next((name for name in changed if name in FIXED), None):
        raise UserError(
            f"--{name}={now[name]} cannot go on from {folder}, which has the state of --{name}={before[name]}; give "
            "that, or start anew."
        )
    # The resume of a run without --seed is told it by the checkpoint.
    return [
        f"--{name}={now[name]} has no effect: {folder} brings back {before[name]}."
        if name in HELD
        else f"--{name} was {before[name]} and is {now[name]}: the run goes on, but not as it would have."
        for name in changed
        if not (name == "seed" and now[name] is None)
    ]


def facts_of(options: argparse.Namespace, data: str, base: str, steps: int) -> dict[str, Any]:
    """What a checkpoint keeps to tell its run by; `data`, `base`: hashes. A constant learning rate has no course."""
    return {"data": data, "base": base, "course": 0 if options.lr_scheduler.startswith("constant") else steps}


def changed_facts(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A sentence for each fact that is not as it was when the checkpoint `folder` was written."""
    return [
        f"{begin.format(now=now[name])} {folder}: the run goes on, but not as it would have."
        for name, begin in FACTS.items()
        if name in before and before[name] != now[name]
    ]
