"""Batches for the training loop, read from the cache in the order of the stream."""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from sd3.common import shared_memory
from sd3.common.command_line import UserError
from sd3.native.cache import Cache
from sd3.native.loading import (
    Loaded,
    Packed,
    Refusal,
    Shielded,
    WorkerDeaths,
    begin_loading,
    handed_over,
    readable,
    refused,
)
from sd3.native.pictures import class_samples, instance_samples
from sd3.native.precompute import Precompute
from sd3.native.prior import class_pictures
from sd3.native.randomness import seed_of
from sd3.native.step import Batch
from sd3.native.stream import Stream
from sd3.native.text import Tokenizers, warn_of_cuts

FEW = 4  # captions of a data set that are sent to the device once, not with each batch


@dataclass(frozen=True)
class Item:
    """A picture with its caption: the cache's keys of its views (plain, and mirrored where flips are on)."""

    name: str
    latents: tuple[str, ...]
    caption: str


class Items:
    """Everything the run is trained on: pictures of the subject and, with prior preservation, of its class."""

    def __init__(self, options: argparse.Namespace, precompute: Precompute) -> None:
        """Find the pictures and have what is missing in the cache computed; every rank calls this.

        Raises:
            UserError: data or cache cannot be read or written.
        """
        halves = [instance_samples(options)]
        if options.with_prior_preservation:
            halves.append(class_samples(options, class_pictures(options)))
        keys = iter(precompute.latents([view for half in halves for sample in half for view in sample.views]))
        self.halves = [
            [Item(one.views[0].name, tuple(next(keys) for _ in one.views), one.caption) for one in half]
            for half in halves
        ]
        self.captions = list(dict.fromkeys(item.caption for half in self.halves for item in half))

    def __len__(self) -> int:
        """Samples of an epoch; the smaller half is gone through more than once."""
        return max(len(half) for half in self.halves)

    def __getitem__(self, number: int) -> list[Item]:
        """What a number of the stream stands for: one item of each half."""
        return [half[number % len(half)] for half in self.halves]

    def signature(self) -> str:
        """A hash of pictures and captions, by which a resume knows its data again."""
        facts = [[(item.latents, item.caption) for item in half] for half in self.halves]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


class Texts:
    """What the model is given for a caption: embeds from the cache, or token ids where text encoders are trained."""

    def __init__(self, cache: Cache, keys: dict[str, str] | None, tokens: dict[str, tuple[torch.Tensor, ...]]) -> None:
        """`keys` of the embeds in the cache by caption; None to give `tokens`."""
        self.cache, self.keys, self.tokens = cache, keys, tokens

    @classmethod
    def prepare(cls, options: argparse.Namespace, items: Items, precompute: Precompute, dtype: torch.dtype) -> Texts:
        """Have the captions' embeds in the cache, or tokenize them; every rank calls this."""
        captions, length = items.captions, options.max_sequence_length
        if precompute.accelerator.is_main_process and "SD3_CUTS_PRINTED" not in os.environ:  # by the launcher
            warn_of_cuts(precompute.model, captions, length)
        if not options.train_text_encoder:
            return cls(
                precompute.cache, dict(zip(captions, precompute.prompts(captions, dtype, length), strict=True)), {}
            )
        columns = Tokenizers(precompute.model, length)(captions)
        return cls(precompute.cache, None, dict(zip(captions, zip(*columns, strict=True), strict=True)))

    def __getitem__(self, caption: str) -> tuple[torch.Tensor, ...]:
        """Prompt embeds [T, D] and pooled [P], or the three token ids."""
        if self.keys is None:
            return self.tokens[caption]
        entry = self.cache.read(self.keys[caption])
        return entry["prompt"], entry["pooled"]


@dataclass(frozen=True)
class Samples(Dataset):
    """Items with their latents, by position in the stream."""

    items: Items
    stream: Stream
    cache: Cache

    def __getitem__(self, position: int) -> tuple[int, list[tuple[torch.Tensor, torch.Tensor, str]]]:
        """The position, and mean, log-variance and caption of one item of each half."""
        flipped = random.Random(seed_of(self.stream.seed, "flip", position)).random() < 0.5
        found = []
        for item in self.items[self.stream.sample(position)]:
            entry = self.cache.read(item.latents[flipped and len(item.latents) > 1])
            found.append((entry["mean"], entry["logvar"], item.caption))
        return position, found


class Loader:
    """This rank's batches, one after another, from a position of the stream to the end of the run."""

    def __init__(self, options: argparse.Namespace, samples: Samples, texts: Texts, device: torch.device) -> None:
        """`device`: where the batches are to be."""
        self.options, self.samples, self.texts, self.device = options, samples, texts, device
        self.workers = options.dataloader_num_workers

    def batches(self, position: int, rank: int, steps: int) -> Iterator[Batch]:
        """The batches of a rank over `steps` optimizer steps from `position` on.

        Raises:
            UserError: a loader process cannot be started or has died, or the cache cannot be read.
        """
        captions, few = self.samples.items.captions, None
        if self._few():
            few = [text.to(self.device) for text in readable(self.samples.cache, lambda: self._texts(captions))]
        for positions, mean, logvar, texts, rows in self._loaded(self._loader(position, rank, steps)):
            mean, logvar, rows, *texts = (
                tensor.to(self.device, non_blocking=True) for tensor in (mean, logvar, rows, *texts)
            )
            texts = texts if few is None else few
            yield Batch(mean, logvar, tuple(text.index_select(0, rows) for text in texts), positions)

    def _loader(self, position: int, rank: int, steps: int) -> DataLoader:
        return DataLoader(
            Shielded(self.samples),
            batch_sampler=self.samples.stream.batches(position, rank, steps),
            collate_fn=self._collate_or_refuse,
            num_workers=self.workers,
            # From pinned memory the device fetches a batch while it computes on the one before.
            pin_memory=self.device.type in ("cuda", "npu"),
            pin_memory_device="npu" if self.device.type == "npu" else "",  # CUDA needs no naming
            prefetch_factor=4 if self.workers else None,
            worker_init_fn=functools.partial(begin_loading, os.getpid(), self.workers),
        )

    def _loaded(self, loader: DataLoader) -> Iterator[Loaded]:
        """What the loader loads, with what goes wrong in its processes as UserError."""
        if self.workers:
            shared_memory.check(self.workers)
        try:
            # Kept: to shut it down is to wait for its processes and its thread, which may be stuck.
            self.iterator = iter(loader)
        except (OSError, RuntimeError) as error:
            raise shared_memory.no_loaders(self.workers, f"loader processes cannot be started: {error}") from None
        deaths = WorkerDeaths() if self.workers else None
        while True:
            try:
                with deaths.raised() if deaths else contextlib.nullcontext():
                    found = next(self.iterator)
            except StopIteration:
                return
            except (RuntimeError, OSError) as error:
                if isinstance(error, RuntimeError) and shared_memory.DEATH not in str(error):
                    raise
                lost = "has died" if isinstance(error, RuntimeError) else "cannot hand a batch over"
                raise shared_memory.no_loaders(self.workers, f"a loader process {lost}: {error}") from None
            if isinstance(found, Refusal):
                raise UserError(*found)
            yield found.unpacked() if isinstance(found, Packed) else found

    def _few(self) -> bool:
        return len(self.samples.items.captions) <= FEW

    def _texts(self, captions: Sequence[str]) -> list[torch.Tensor]:
        """What the model is given for each of the captions, stacked."""
        return [torch.stack(column) for column in zip(*(self.texts[caption] for caption in captions), strict=True)]

    def _collate_or_refuse(self, batch: Sequence) -> Loaded | Packed | Refusal:
        """A batch as the rank is to get it."""
        if refusal := next((one for one in batch if isinstance(one, Refusal)), None):
            return refusal
        found = refused(self.samples.cache, lambda: self._collate(batch))
        if not self.workers or isinstance(found, Refusal):
            return found
        return handed_over(Loaded(*found), self.device.type, self.workers)

    def _collate(self, batch: Sequence) -> Loaded:
        """A batch of samples.

        The rows are the subject's pictures, then those of the class. Where the data set has few captions, the texts
        are none, and the rows count them in its own order.
        """
        positions = [position for position, _ in batch]
        rows = [half for halves in zip(*(found for _, found in batch), strict=True) for half in halves]
        captions, texts = self.samples.items.captions, []
        if not self._few():
            captions = list(dict.fromkeys(caption for _, _, caption in rows))
            texts = self._texts(captions)
        return Loaded(
            positions,
            torch.stack([mean for mean, _, _ in rows]),
            torch.stack([logvar for _, logvar, _ in rows]),
            texts,
            torch.tensor([captions.index(caption) for _, _, caption in rows]),
        )


def names_at(items: Items, stream: Stream, positions: Sequence[int]) -> list[str]:
    """The pictures at positions of the stream, for a message."""
    return [Path(item.name).name for position in positions for item in items[stream.sample(position)]]
