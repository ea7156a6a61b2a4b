"""Captions to what the transformer reads: prompt embeds and pooled prompt embeds of the three text encoders."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import (
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerBase,
    T5EncoderModel,
    T5TokenizerFast,
)

from sd3.common.model_files import has_t5, parts_of
from sd3.common.model_sizes import CLIP_TOKENS
from sd3.common.part_loading import joint_attention_dim, load_tokenizer, load_weights, tokens_without_t5
from sd3.data.caption_lengths import caption_lengths, cut_sentence

logger = logging.getLogger(__name__)
ENCODERS = {
    "text_encoder": CLIPTextModelWithProjection,
    "text_encoder_2": CLIPTextModelWithProjection,
    "text_encoder_3": T5EncoderModel,
}
TOKENIZERS = {"tokenizer": CLIPTokenizer, "tokenizer_2": CLIPTokenizer, "tokenizer_3": T5TokenizerFast}


class TextEncoders(torch.nn.Module):
    """The two CLIP encoders and T5 as one module, so that training them is training one model."""

    def __init__(self, encoders: Sequence[torch.nn.Module | None], width: int = 0) -> None:
        """`encoders`: CLIP, the second CLIP, T5; None for T5 where a model has none, with the `width` of its embeds."""
        super().__init__()
        self.width = width
        for name, encoder in zip(ENCODERS, encoders, strict=True):
            self.add_module(name, encoder)

    def forward(self, tokens: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompt embeds [B, 77 + T, D] and pooled prompt embeds [B, P] of token ids [B, 77], [B, 77] and [B, T].

        Both CLIPs' next-to-last hidden states side by side, padded with zeros to T5's width, then T5's output after
        them; pooled are both CLIPs' projected outputs (Esser et al. 2024, arXiv:2403.03206, figure 2). Without T5 its
        output is zeros, as in StableDiffusion3Pipeline, and of its token ids only the shape counts.
        """
        clips = [
            encoder(ids, output_hidden_states=True)
            for encoder, ids in zip((self.text_encoder, self.text_encoder_2), tokens, strict=False)
        ]
        joined = torch.cat([clip.hidden_states[-2] for clip in clips], dim=-1)
        if self.text_encoder_3 is None:
            t5 = joined.new_zeros(*tokens[2].shape, self.width)
        else:
            t5 = self.text_encoder_3(tokens[2])[0]
        joined = torch.nn.functional.pad(joined, (0, t5.shape[-1] - joined.shape[-1]))
        return torch.cat([joined.to(t5.dtype), t5], dim=1), torch.cat([clip.text_embeds for clip in clips], dim=-1)


class Tokenizers:
    """The tokenizers of a pipeline: three, or two where it has no T5."""

    def __init__(self, model: Path, t5_tokens: int) -> None:
        """`model`: the pipeline directory; `t5_tokens`: length that captions are padded or cut to for T5."""
        self.t5_tokens = t5_length(model, t5_tokens)
        self._parts: list[tuple[PreTrainedTokenizerBase, int]] = [
            (load_tokenizer(kind, model / name), CLIP_TOKENS if kind is CLIPTokenizer else t5_tokens)
            for name, kind in TOKENIZERS.items()
            if kind is CLIPTokenizer or has_t5(model)
        ]

    def __call__(self, captions: Sequence[str]) -> tuple[torch.Tensor, ...]:
        """Token ids [B, 77], [B, 77] and [B, T5's length]; without T5 the last are zeros."""
        tokens = tuple(
            tokenizer(
                list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            ).input_ids
            for tokenizer, length in self._parts
        )
        missing = len(TOKENIZERS) - len(tokens)
        return (*tokens, *[torch.zeros(len(captions), self.t5_tokens, dtype=torch.long)] * missing)


def warn_of_cuts(model: Path, captions: Sequence[str], t5_tokens: int, noun: str = "captions") -> None:
    """Log how many of the captions lose their end in CLIP or T5; `model`: the pipeline directory."""
    if sentence := cut_sentence(caption_lengths(captions, model, t5_tokens), len(captions), noun):
        logger.warning("%s", sentence)


def t5_length(model: Path, t5_tokens: int) -> int:
    """How many of the prompt embeds are T5's: `t5_tokens`, or the zeros that stand for them in a model without T5."""
    return t5_tokens if has_t5(model) else tokens_without_t5(t5_tokens, CLIP_TOKENS)


def load_encoder(model: Path, name: str, variant: str | None, dtype: torch.dtype) -> torch.nn.Module:
    """The text encoder `name` of a pipeline directory, in evaluation mode on the CPU."""
    encoder = load_weights(ENCODERS[name], model / name, variant, torch_dtype=dtype)
    return encoder.requires_grad_(False).eval()


def load_encoders(model: Path, variant: str | None, dtype: torch.dtype) -> TextEncoders:
    """All that the pipeline has, frozen."""
    there = parts_of(model)
    encoders = [load_encoder(model, name, variant, dtype) if name in there else None for name in ENCODERS]
    return TextEncoders(encoders, joint_attention_dim(model / "transformer"))
