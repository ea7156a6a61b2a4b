"""The pipeline that validations paint with: the model in training, and of the rest only what is needed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from diffusers.utils import logging as diffusers_logging
from PIL import Image

from sd3.common.model_files import parts_of
from sd3.common.part_loading import load_scheduler, load_tokenizer, load_weights
from sd3.native.model import Trained
from sd3.native.precompute import Precompute
from sd3.native.text import ENCODERS, TOKENIZERS, warn_of_cuts
from sd3.native.validation import validate


class Painter:
    """Paints the validation prompt with the weights of the moment."""

    def __init__(
        self, options: argparse.Namespace, accelerator: Accelerator, precompute: Precompute, dtype: torch.dtype
    ) -> None:
        """Have the prompt's embeds computed before training starts; every rank calls this."""
        self.options, self.accelerator, self.dtype = options, accelerator, dtype
        self.model: Path = precompute.model
        self.cache = precompute.cache
        self.wanted = bool(options.validation_prompt) and options.num_validation_images > 0
        self.keys: list[str] = []
        if self.wanted and not options.train_text_encoder:
            # The empty text is what guidance leads away from.
            self.keys = precompute.prompts([options.validation_prompt, ""], dtype, options.max_sequence_length)
        if self.wanted and accelerator.is_main_process:
            warn_of_cuts(self.model, [options.validation_prompt], options.max_sequence_length, "validation prompts")

    def due(self, epoch: int) -> bool:
        """Is there something to paint after this epoch?"""
        return self.wanted and epoch % self.options.validation_epochs == 0

    def paint(self, trained: Trained, epoch: int, phase: str = "validation") -> list[Image.Image]:
        """Paint and tell the trackers; the main rank alone calls this."""
        diffusers_logging.set_verbosity_error()
        pipeline = StableDiffusion3Pipeline(
            transformer=trained.parts["transformer"],
            vae=load_weights(AutoencoderKL, self.model / "vae", self.options.variant),
            scheduler=load_scheduler(self.model / "scheduler"),
            **self._text_parts(trained),
        ).to(self.accelerator.device)
        return validate(self.options, pipeline, self.accelerator, epoch, phase, self.dtype, self._prompt())

    def _text_parts(self, trained: Trained) -> dict[str, Any]:
        names = (*ENCODERS, *TOKENIZERS)
        if trained.denoiser.encoders is None:
            return dict.fromkeys(names)
        there = parts_of(self.model)
        tokenizers = {name: load_tokenizer(TOKENIZERS[name], self.model / name) for name in TOKENIZERS if name in there}
        encoders = {name: getattr(trained.denoiser.encoders, name) for name in ENCODERS}
        return dict.fromkeys(names) | encoders | tokenizers

    def _prompt(self) -> dict[str, Any]:
        """The prompt for the pipeline: its text where text encoders are trained, else embeds [1, 77 + T, D].

        T5 reads as many tokens as in training: padded to another length, a prompt gives another image.
        """
        if not self.keys:
            length = self.options.max_sequence_length
            return {"prompt": self.options.validation_prompt, "max_sequence_length": length}
        entries = dict(zip(("", "negative_"), map(self.cache.read, self.keys), strict=True))
        return {
            f"{sign}{name}": entry[key][None].to(self.accelerator.device)
            for sign, entry in entries.items()
            for name, key in (("prompt_embeds", "prompt"), ("pooled_prompt_embeds", "pooled"))
        }
