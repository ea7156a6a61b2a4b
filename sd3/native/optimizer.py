"""Optimizer and learning rate schedule, as the flags ask for them."""

from __future__ import annotations

import argparse
import importlib
import logging
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from diffusers.optimization import get_scheduler
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from sd3.common.command_line import UserError

Logger = logging.Logger | logging.LoggerAdapter
Groups = Sequence[dict[str, Any]]
NPU_FUSED_DTYPES = {torch.float16, torch.float32}


def scaled_learning_rate(options: argparse.Namespace, ranks: int) -> float:
    """--learning_rate; with --scale_lr times the pictures that all ranks together put into an optimizer step."""
    if not options.scale_lr:
        return options.learning_rate
    return options.learning_rate * options.gradient_accumulation_steps * options.train_batch_size * ranks


def make_optimizer(options: argparse.Namespace, groups: Groups, device_type: str, logger: Logger) -> Optimizer:
    """The optimizer of the flags over `groups`: dicts with `params`, `lr` and, for text encoders, `weight_decay`.

    The transformer's group comes first. Call it with the parameters where they are trained.

    Raises:
        UserError: a package is missing, or the parameters cannot be trained by the AdamW asked for.
    """
    settings = {
        "betas": (options.adam_beta1, options.adam_beta2),
        "weight_decay": options.adam_weight_decay,
        "eps": options.adam_epsilon,
    }
    name = options.optimizer.lower()
    if name not in ("adamw", "prodigy"):
        logger.warning(f"--optimizer={options.optimizer} is not known (AdamW and prodigy are); AdamW is taken.")
    if name == "prodigy":
        if options.use_8bit_adam:
            logger.warning("--use_8bit_adam does nothing with --optimizer=prodigy.")
        return _prodigy(options, groups, settings, logger)
    if options.use_8bit_adam:
        return _package("bitsandbytes", "--use_8bit_adam").optim.AdamW8bit(groups, **settings)
    return _adamw(options.adamw, groups, settings, device_type)


def _package(name: str, option: str) -> ModuleType:
    """Import what only some runs need."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        reason = "is not installed" if isinstance(error, ModuleNotFoundError) else f"does not load ({error})"
        raise UserError(f"{option} needs {name}, which {reason}; pip install {name}.", status=3) from None


def _prodigy(
    options: argparse.Namespace,
    groups: Groups,
    settings: dict[str, Any],
    logger: Logger,
) -> Optimizer:
    """Prodigy estimates one step size for all it trains, so all groups get the transformer's learning rate."""
    rate = groups[0]["lr"]
    if rate <= 0.1:
        logger.warning(f"A learning rate of {rate:g} is low for prodigy, which finds its own: use one about 1.")
    if len(groups) > 1 and options.text_encoder_lr:
        logger.warning(f"prodigy takes --learning_rate for the text encoders too, not {options.text_encoder_lr:g}.")
    return _package("prodigyopt", "--optimizer=prodigy").Prodigy(
        [{**group, "lr": rate} for group in groups],
        **settings,
        beta3=options.prodigy_beta3,
        decouple=options.prodigy_decouple,
        use_bias_correction=options.prodigy_use_bias_correction,
        safeguard_warmup=options.prodigy_safeguard_warmup,
    )


def _adamw(choice: str, groups: Groups, settings: dict[str, Any], device_type: str) -> Optimizer:
    """AdamW by `choice`; auto takes the fastest that the device has."""
    if choice in ("foreach", "loop"):
        return AdamW(groups, **settings, foreach=choice == "foreach")
    try:
        if device_type == "npu":
            return _npu_fused(groups, settings)
        # Copies, for it notes in the groups that it is fused before it refuses to be.
        return AdamW([dict(group) for group in groups], **settings, fused=True)
    except (ImportError, RuntimeError) as error:  # before torch 2.4 there was none for a CPU
        if choice == "fused":
            reason = str(error).splitlines()[0].rstrip(".")
            raise UserError(f"--adamw=fused does not work here ({reason}); use --adamw=auto.") from None
    return AdamW(groups, **settings, foreach=device_type != "cpu")


def _npu_fused(groups: Groups, settings: dict[str, Any]) -> Optimizer:
    """torch_npu's AdamW, which lays all parameters, and all gradients, into one tensor each.

    Raises:
        ImportError: torch_npu is not there.
        RuntimeError: it cannot train these parameters.
    """
    from torch_npu.optim import NpuFusedAdamW

    if not {parameter.dtype for group in groups for parameter in group["params"]} <= NPU_FUSED_DTYPES:
        raise RuntimeError("NpuFusedAdamW trains float32 and float16 alone")
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        # ZeRO gives parameters new gradients at each step; this optimizer would go on reading its own.
        raise RuntimeError("NpuFusedAdamW does not go with DeepSpeed")

    class Fused(NpuFusedAdamW):
        def zero_grad(self, set_to_none: bool = True) -> None:
            # It refuses to set its gradients to None, which is what accelerate asks for.
            super().zero_grad(set_to_none=False)

    return Fused(groups, **settings)


def make_lr_schedule(options: argparse.Namespace, optimizer: Optimizer, steps: int) -> LambdaLR:
    """The course of the learning rate over `steps` optimizer steps; step it once at each, whatever the ranks.

    (accelerate steps a schedule it has prepared once a rank, and the pinned scripts stretch theirs to match.)
    """
    return get_scheduler(
        options.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=options.lr_warmup_steps,
        num_training_steps=steps,
        num_cycles=options.lr_num_cycles,
        power=options.lr_power,
    )
