"""Loads single parts of a pipeline, with the LoRA's share of each, and lets go of them again."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from sd3.common.command_line import UserError
from sd3.common.device_errors import out_of_memory
from sd3.common.part_loading import joint_attention_dim, load_scheduler, load_tokenizer, load_weights
from sd3.model.lora_layers import add_lora
from sd3.model.lora_settings import LoraError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sd3.inference.sources import Sources

ENCODERS = {
    "text_encoder": ("tokenizer", CLIPTextModelWithProjection, CLIPTokenizer),
    "text_encoder_2": ("tokenizer_2", CLIPTextModelWithProjection, CLIPTokenizer),
    "text_encoder_3": ("tokenizer_3", T5EncoderModel, T5TokenizerFast),
}


class Weights:
    """The parts of `sources` in `dtype`, each loaded when it is asked for."""

    def __init__(self, sources: Sources, dtype: torch.dtype, lora_scale: float) -> None:
        """Read the LoRA, if there is one, and nothing else yet."""
        self.sources = sources
        self.dtype = dtype
        self.lora_scale = lora_scale
        self.encoder_seconds = 0.0  # spent on bringing text encoders from the disk to the device
        with self._lora_error_as_user_error():
            self._lora = sources.lora_file.tensors() if sources.lora_file else {}

    def text_encoder(self, part: str, device: torch.device) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
        """Tokenizer and encoder of `part`, a key of ENCODERS, on the device."""
        start = time.perf_counter()
        tokenizer_part, encoder_class, tokenizer_class = ENCODERS[part]
        tokenizer = load_tokenizer(tokenizer_class, self.sources.parts[tokenizer_part], local_files_only=True)
        encoder = self._load_weights(encoder_class, part)
        self._add_lora(part, encoder)
        encoder.requires_grad_(False).eval().to(device)
        self.encoder_seconds += time.perf_counter() - start
        return tokenizer, encoder

    def transformer(self) -> SD3Transformer2DModel:
        """The transformer in host memory."""
        transformer = self._load_weights(SD3Transformer2DModel, "transformer")
        self._add_lora("transformer", transformer)
        return transformer.requires_grad_(False).eval()

    def vae(self) -> AutoencoderKL:
        """The autoencoder in host memory."""
        return self._load_weights(AutoencoderKL, "vae").requires_grad_(False).eval()

    def scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        """The scheduler, with the model's own settings."""
        return load_scheduler(self.sources.parts["scheduler"], local_files_only=True)

    def encoders(self) -> list[str]:
        """The text encoders that the model has, keys of ENCODERS."""
        return [part for part in ENCODERS if part in self.sources.parts]

    def prompt_width(self) -> int:
        """Width of the prompt embeds that the transformer reads."""
        return joint_attention_dim(self.sources.parts["transformer"])

    def _add_lora(self, part: str, model: torch.nn.Module) -> None:
        if self.sources.lora_file and (modules := self.sources.lora_file.parts.get(part)):
            with self._lora_error_as_user_error():
                add_lora(model, modules, self._lora, self.lora_scale)

    @contextlib.contextmanager
    def _lora_error_as_user_error(self) -> Iterator[None]:
        """Name the file that cannot be used."""
        try:
            yield
        except LoraError as error:
            raise UserError(f"--lora={self.sources.lora} {error}") from None

    def _load_weights(self, kind: Any, part: str) -> Any:  # noqa: ANN401  # the class given is the class returned
        return load_weights(kind, self.sources.parts[part], torch_dtype=self.dtype, local_files_only=True)


@contextlib.contextmanager
def told_of_memory(device: str, advice: str) -> Iterator[None]:
    """Turn the many ways of running out of device memory into one sentence.

    Raises:
        UserError: the device's memory is too small; the text ends with `advice`.
    """
    try:
        yield
    except RuntimeError as error:  # of torch.cuda and of torch_npu alike
        told = out_of_memory(error, device, advice)
        if told is None:
            raise
        raise told from None


def release(device: str) -> None:
    """Give back device memory of tensors that nothing refers to any more."""
    gc.collect()
    if device != "cpu":
        getattr(torch, device).empty_cache()
