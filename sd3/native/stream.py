"""The order of the training samples: one endless stream, cut into global batches.

Epoch e is a permutation of all samples that the run's seed and e alone decide. Where a batch reaches past the end of an
epoch it goes on in the next one, so every batch is full. A position in the stream is all that a resume needs to know.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from sd3.native.randomness import seed_of


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed_of(seed, "order", epoch))
    return torch.randperm(length, generator=generator).tolist()


@dataclass(frozen=True)
class Stream:
    """The samples of a run: `length` of them, dealt out to `ranks` in batches, `accumulation` batches a step."""

    seed: int
    length: int
    batch_size: int
    accumulation: int
    ranks: int

    @property
    def samples_a_step(self) -> int:
        """Samples of one optimizer step on all ranks together."""
        return self.batch_size * self.accumulation * self.ranks

    @property
    def steps_an_epoch(self) -> int:
        """Optimizer steps in which every sample is seen once, the last one's surplus counted in."""
        return math.ceil(self.length / self.samples_a_step)

    def sample(self, position: int) -> int:
        """Number of the sample at a position of the stream."""
        epoch, place = divmod(position, self.length)
        return _permutation(self.seed, epoch, self.length)[place]

    def batches(self, position: int, rank: int, steps: int) -> Iterator[list[int]]:
        """The positions in each batch of a rank, over `steps` optimizer steps from `position` on."""
        for batch in range(steps * self.accumulation):
            first = position + (batch * self.ranks + rank) * self.batch_size
            yield list(range(first, first + self.batch_size))
