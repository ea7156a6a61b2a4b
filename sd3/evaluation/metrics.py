"""The five figures, from features. Every function takes arrays [images, dimension].

CLIP-T, CLIP-I and DINO: Ruiz et al., DreamBooth, CVPR 2023. KID: Bińkowski et al., Demystifying MMD GANs, ICLR 2018.
FID: Heusel et al., GANs Trained by a Two Time-Scale Update Rule, NeurIPS 2017.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torchmetrics.functional import pairwise_cosine_similarity
from torchmetrics.image.fid import FrechetInceptionDistance

from sd3.evaluation.bootstrap import units_of

NORMAL_975 = 1.959963984540054  # the standard normal distribution's quantile at 0.975


class _AsTheyAre(torch.nn.Module):
    """Lets torchmetrics, which wants to see pictures, take features instead."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.num_features = dimension

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def cosines(features: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Cosine similarities [n, m] of n rows with m rows, each in -1 to 1."""
    return pairwise_cosine_similarity(torch.from_numpy(features).double(), torch.from_numpy(others).double()).numpy()


def prompt_fidelity(features: np.ndarray, texts: np.ndarray, text_of: np.ndarray) -> np.ndarray:
    """CLIP-T of each picture [n]: the cosine of its embedding and that of its text, row `text_of[i]` of `texts`."""
    return cosines(features, texts)[np.arange(len(features)), text_of]


def subject_fidelity(features: np.ndarray, references: np.ndarray) -> np.ndarray:
    """CLIP-I or DINO of each picture [n]: the mean cosine of its features and those of every reference."""
    return cosines(features, references).mean(axis=1)


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x.astype(np.float64) @ y.T.astype(np.float64) / x.shape[1] + 1) ** 3


class _Pairs:
    """The mean kernel over pairs of different units, and the same without each unit.

    Args:
        kernel: of each pair [n, m]; overwritten.
        rows, columns: the units of the images on either side, [n] and [m], below `units`.
        alone: two units less one are a single one, of which all pairs count.
    """

    def __init__(
        self, kernel: np.ndarray, rows: np.ndarray, columns: np.ndarray, units: int, alone: bool = False
    ) -> None:
        self.rows, self.columns = np.bincount(rows, minlength=units), np.bincount(columns, minlength=units)
        same = rows[:, None] == columns
        self.alone: np.ndarray | None = None
        if alone and np.count_nonzero(self.rows) == 2:
            np.fill_diagonal(kernel, 0)
            self.alone = np.bincount(rows, (kernel * same).sum(axis=1), units)
        kernel[same] = 0
        self.total = kernel.sum()
        lost = np.bincount(rows, kernel.sum(axis=1), units)
        self.lost = 2 * lost if rows is columns else lost + np.bincount(columns, kernel.sum(axis=0), units)

    def mean(self) -> float:
        """Over all pairs of different units."""
        return self.total / (self.rows.sum() * self.columns.sum() - (self.rows * self.columns).sum())

    def without(self) -> np.ndarray:
        """The same without each unit [units]; NaN where no pair is left."""
        same = self.rows * self.columns
        pairs = (self.rows.sum() - self.rows) * (self.columns.sum() - self.columns) - (same.sum() - same)
        sums = self.total - self.lost
        if self.alone is not None:
            left = self.rows.sum() - self.rows
            single = self.rows > 0
            pairs = np.where(single, left * (left - 1), pairs)
            sums = np.where(single, self.alone.sum() - self.alone, sums)
        return np.divide(sums, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)


class _Kernels:
    """The three averages of an unbiased squared MMD: among the images, among the references, and across.

    A unit is what is independent of all else: the images of a prompt, with the references of the same prompt where it
    is known of them; an image where there is one prompt; a reference whose prompt is not known.
    """

    def __init__(
        self, features: np.ndarray, references: np.ndarray, prompts: np.ndarray, captions: np.ndarray | None
    ) -> None:
        ours, theirs = _units(prompts, len(references), captions)
        units = int(max(ours.max(), theirs.max())) + 1
        self.images, self.references = np.bincount(ours, minlength=units), np.bincount(theirs, minlength=units)
        apart = units == len(np.unique(ours)) + len(references)  # no reference's prompt is known
        self.within = _Pairs(_kernel(features, features), ours, ours, units, alone=apart)
        self.across = _Pairs(_kernel(features, references), ours, theirs, units)
        self.among = _Pairs(_kernel(references, references), theirs, theirs, units)

    def mmd(self) -> float:
        """The unbiased squared MMD."""
        return float(self.within.mean() + self.among.mean() - 2 * self.across.mean())

    def without(self) -> list[np.ndarray]:
        """The same without each unit that has images, and without each of the other ones; NaN where nothing is left."""
        parts = self.within.without() + self.among.without() - 2 * self.across.without()
        return [parts[self.images > 0], parts[self.images == 0]]

    def left(self) -> int:
        """The fewest images, or references, that there are without one unit."""
        return int(min(each.sum() - each.max() for each in (self.images, self.references)))


def _units(prompts: np.ndarray, references: int, captions: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """The unit of each image [n] and of each reference [m]; two of one number are of one prompt."""
    unit, ours = units_of(prompts)
    if captions is None or unit != "prompts" or len(np.unique(captions)) == 1:
        return ours, ours.max() + 1 + np.arange(references)
    _, numbers = np.unique(np.concatenate([prompts, captions]), return_inverse=True)
    return numbers[: len(prompts)], numbers[len(prompts) :]


def kid(
    features: np.ndarray, references: np.ndarray, prompts: np.ndarray | None = None,
    captions: np.ndarray | None = None,
) -> float:  # fmt: skip
    """Kernel inception distance: the unbiased squared MMD under the kernel (x.y / dimension + 1)^3.

    Images of one prompt are alike and no independent draws, so averages are over pairs of different prompts; over all
    pairs where there is one prompt, or where `prompts` [n] are not given. References count in all pairs, unless
    `captions` [m] has their prompts, as those of a captioned data set.

    It can be below zero. At least 2 images are needed on each side.
    """
    known = np.zeros(len(features)) if prompts is None else prompts
    return _Kernels(features, references, known, captions).mmd()


def kid_margin(
    features: np.ndarray, references: np.ndarray, prompts: np.ndarray, base: np.ndarray | None = None,
    captions: np.ndarray | None = None,
) -> float | None:  # fmt: skip
    """Half the width of a 95 % interval of KID, or of its difference from the KID of `base`; None for too few images.

    A jackknife (Efron, Stein: The Jackknife Estimate of Variance, 1981) over prompts, or over images where `prompts`
    [n] are all the same, and over references; a prompt takes the references of the same one of `captions` [m] with it.
    Bootstrap samples hold images twice, and an image is so like itself that their MMD is too large. With `base`, whose
    rows are of the same prompts and seeds as those of `features`, both lose the same unit at a time, and what they
    share counts once.
    """
    ours = _Kernels(features, references, prompts, captions)
    # What is left has to have two images on each side, or there is no pair to compare.
    if ours.left() < 2:
        return None
    parts = ours.without()
    if base is not None:
        theirs = _Kernels(base, references, prompts, captions).without()
        parts = [part - their for part, their in zip(parts, theirs, strict=True)]
    variance = sum(
        (len(part) - 1) / len(part) * float(((part - part.mean()) ** 2).sum()) for part in parts if len(part)
    )
    return None if math.isnan(variance) else NORMAL_975 * math.sqrt(variance)


def fid(features: np.ndarray, references: np.ndarray) -> float:
    """Fréchet distance of two normal distributions fitted to the features; at least 2 pictures on each side."""
    metric = FrechetInceptionDistance(feature=_AsTheyAre(features.shape[1])).set_dtype(torch.float64)
    metric.update(torch.from_numpy(references).double(), real=True)
    metric.update(torch.from_numpy(features).double(), real=False)
    return float(metric.compute())
