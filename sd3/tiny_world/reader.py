"""Trains the three text encoders to tell every attribute of a caption, in the very tensors that the transformer reads.

The published encoders were trained on billions of pairs; here a caption's attributes are known, and a classifier on
each tensor is the shortest way to make the encoders say them. The classifiers are thrown away.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import CLIPTokenizer, PreTrainedTokenizerBase

from sd3.common.model_parts import make_clip, make_t5
from sd3.common.model_sizes import CLIP_TOKENS
from sd3.native.text import ENCODERS, TOKENIZERS, TextEncoders, load_encoders
from sd3.tiny_world.grammar import ATTRIBUTES, caption_of, draw_scene, forget, labels, rare_word, with_rare_word
from sd3.tiny_world.loop import Trainer, rounded, seeded
from sd3.tiny_world.sizes import TINY_WORLD

STEPS, BATCH, LEARNING_RATE = 2000, 48, 3e-3
T5_TOKENS = (24, 256)  # shortest and longest padded length that training draws; the pipeline's default is the longest
_RARE = 0.2  # share of captions with a rare word
_SCALE_WEIGHT = 0.1
# The last class of each is "left open"; the last question is which letter begins the rare word.
_CLASSES = [len(values) + 1 for values in ATTRIBUTES.values()] + [27]


def draw_length(rng: random.Random, longest: int = T5_TOKENS[1]) -> int:
    """A padded length, short ones as likely as long ones on a logarithmic scale."""
    short = T5_TOKENS[0]
    return round(short * (longest / short) ** rng.random())


class Reader:
    """Tokenizers and encoders together: captions to what the transformer reads."""

    def __init__(self, folder: Path, encoders: TextEncoders) -> None:
        """`folder` is the pipeline directory, with tokenizers."""
        self.encoders = encoders
        self._tokenizers: list[PreTrainedTokenizerBase] = [
            kind.from_pretrained(folder / name, clean_up_tokenization_spaces=True) for name, kind in TOKENIZERS.items()
        ]
        self._known: dict[str, tuple[list[int], ...]] = {}

    @classmethod
    def load(cls, folder: Path) -> Reader:
        """The trained reader of a pipeline directory, frozen, in float32."""
        return cls(folder, load_encoders(folder, None, torch.float32))

    def _ids(self, caption: str) -> tuple[list[int], ...]:
        if caption not in self._known:
            self._known[caption] = tuple(tokenizer(caption).input_ids for tokenizer in self._tokenizers)
        return self._known[caption]

    def longest(self, captions: Sequence[str]) -> int:
        """Tokens of the longest caption, begin and end included."""
        return max(len(ids) for caption in captions for ids in self._ids(caption))

    def tokens(self, captions: Sequence[str], t5_tokens: int, clip_tokens: int = CLIP_TOKENS) -> list[torch.Tensor]:
        """Token ids [B, clip_tokens], [B, clip_tokens] and [B, t5_tokens].

        Raises:
            ValueError: a caption does not fit.
        """
        rows = zip(*(self._ids(caption) for caption in captions), strict=True)
        padded = []
        for ids, tokenizer in zip(rows, self._tokenizers, strict=True):
            length = clip_tokens if isinstance(tokenizer, CLIPTokenizer) else t5_tokens
            if max(map(len, ids)) > length:
                raise ValueError(f"a caption has {max(map(len, ids))} tokens, expected at most {length}.")
            padded.append(torch.tensor([one + [tokenizer.pad_token_id] * (length - len(one)) for one in ids]))
        return padded

    def __call__(self, captions: Sequence[str], t5_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompt embeds [B, 77 + t5_tokens, D] and pooled prompt embeds [B, P]."""
        return self.encoders(self.tokens(captions, t5_tokens))


class _Questions(torch.nn.Module):
    """Logits for every attribute from a sequence [B, T, D]: each question attends to the tokens that answer it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.queries = torch.nn.Parameter(torch.randn(len(_CLASSES), width) / width**0.5)
        self.answers = torch.nn.ModuleList(torch.nn.Linear(width, classes) for classes in _CLASSES)

    def forward(self, sequence: torch.Tensor) -> list[torch.Tensor]:
        shares = torch.einsum("btd,qd->bqt", sequence, self.queries).softmax(dim=-1)
        gathered = shares @ sequence
        return [answer(gathered[:, i]) for i, answer in enumerate(self.answers)]


def _batch(rng: random.Random) -> tuple[list[str], torch.Tensor]:
    """Captions and their classes [B, questions]."""
    captions, classes = [], []
    for _ in range(BATCH):
        told = forget(draw_scene(rng), rng)
        caption, letter = caption_of(told, rng), 26
        if rng.random() < _RARE:
            word = rare_word(rng)
            caption, letter = with_rare_word(caption, word), ord(word[0]) - ord("a")
        captions.append(caption)
        classes.append([*labels(told), letter])
    return captions, torch.tensor(classes)


def make_encoders(clip_rows: int, t5_rows: int) -> TextEncoders:
    """Encoders with fresh weights for vocabularies of these sizes."""
    clips = [make_clip(size, clip_rows) for size in TINY_WORLD.clips]
    return TextEncoders([*clips, make_t5(TINY_WORLD, t5_rows)])


def _streams(embeds: torch.Tensor, pooled: torch.Tensor, clip_tokens: int) -> list[torch.Tensor]:
    """The transformer's input split by encoder: two CLIP sequences, T5's, two pooled outputs as sequences of one."""
    first, second = (clip.width for clip in TINY_WORLD.clips)
    clip, pooled = embeds[:, :clip_tokens], pooled[:, None]
    widths = (TINY_WORLD.clips[0].projection, TINY_WORLD.clips[1].projection)
    return [
        clip[..., :first], clip[..., first : first + second], embeds[:, clip_tokens:], *pooled.split(widths, dim=-1),
    ]  # fmt: skip


class _Exam(torch.nn.Module):
    """The encoders with a classifier on each of their outputs."""

    def __init__(self, encoders: TextEncoders) -> None:
        super().__init__()
        self.encoders = encoders
        widths = [clip.width for clip in TINY_WORLD.clips] + [TINY_WORLD.t5_width]
        widths += [clip.projection for clip in TINY_WORLD.clips]
        self.questions = torch.nn.ModuleList(_Questions(width) for width in widths)

    def forward(self, tokens: list[torch.Tensor], classes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss, and the share of right answers [outputs, questions]."""
        loss, right = torch.zeros(()), []
        streams = _streams(*self.encoders(tokens), tokens[0].shape[1])
        for questions, stream in zip(self.questions, streams, strict=True):
            answers = questions(stream)
            loss = loss + sum(cross_entropy(one, classes[:, i]) for i, one in enumerate(answers))
            # The transformer expects inputs of about unit size.
            loss = loss + _SCALE_WEIGHT * (stream.square().mean().sqrt() - 1).square()
            right.append([(one.argmax(-1) == classes[:, i]).float().mean() for i, one in enumerate(answers)])
        return loss, torch.tensor(right)


def train_reader(folder: Path, rows: tuple[int, int], seed: int, steps: int = STEPS) -> torch.Tensor:
    """Train the encoders for the tokenizers in `folder` and write them there in float16.

    `rows`: sizes of the CLIP and T5 vocabularies. Returns the share of attributes told right in fresh captions, [5
    outputs, 7 questions].
    """
    exam = seeded(lambda: _Exam(make_encoders(*rows)), seed).eval()  # no dropout
    reader = Reader(folder, exam.encoders)
    trainer = Trainer(exam, LEARNING_RATE, steps)

    def ask(rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
        captions, classes = _batch(rng)
        # CLIP looks back only: what it says of the words does not depend on the padding behind them.
        return exam(reader.tokens(captions, draw_length(rng), draw_length(rng, CLIP_TOKENS)), classes)

    trainer.run(lambda step: ask(random.Random(f"reader {seed} {step}"))[0], "text encoders")
    trainer.settle()
    parts = [getattr(exam.encoders, name) for name in ENCODERS]
    rounded(parts)
    with torch.no_grad():
        shares = torch.stack([ask(random.Random(f"exam {seed} {i}"))[1] for i in range(8)]).mean(0)
    for name, part in zip(ENCODERS, parts, strict=True):
        part.half().save_pretrained(folder / name)
    return shares
