"""The five figures, from features. Every function takes arrays [pictures, dimension].

CLIP-T, CLIP-I and DINO: Ruiz et al., DreamBooth, CVPR 2023. KID: Bińkowski et al., Demystifying MMD GANs, ICLR 2018.
FID: Heusel et al., GANs Trained by a Two Time-Scale Update Rule, NeurIPS 2017.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torchmetrics.functional import pairwise_cosine_similarity
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000
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


def kid_subset_size(generated: int, references: int) -> int:
    """The published 1000, or as many pictures as there are on the smaller side."""
    return min(KID_SUBSET_SIZE, generated, references)


def kid(features: np.ndarray, references: np.ndarray, seed: int) -> float:
    """Kernel inception distance: the unbiased squared MMD under the kernel (x.y / dimension + 1)^3, mean over subsets.

    It can be below zero. At least 2 pictures are needed on each side.
    """
    size = kid_subset_size(len(features), len(references))
    subsets = 1 if size == len(features) == len(references) else KID_SUBSETS  # of the whole there is one subset
    metric = KernelInceptionDistance(feature=_AsTheyAre(features.shape[1]), subsets=subsets, subset_size=size)
    metric.update(torch.from_numpy(references).double(), real=True)
    metric.update(torch.from_numpy(features).double(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # torchmetrics draws its subsets from the global generator
        return float(metric.compute()[0])


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x.astype(np.float64) @ y.T.astype(np.float64) / x.shape[1] + 1) ** 3


def _kid_without_one(features: np.ndarray, references: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The unbiased squared MMD without picture i [n], and without reference j [m]; n and m are at least 3."""
    n, m = len(features), len(references)
    within, across, among = _kernel(features, features), _kernel(features, references), _kernel(references, references)
    np.fill_diagonal(within, 0)
    np.fill_diagonal(among, 0)
    xx, xy, yy = within.sum(), across.sum(), among.sum()
    without_picture = (
        (xx - 2 * within.sum(axis=1)) / ((n - 1) * (n - 2))
        + yy / (m * (m - 1))
        - 2 * (xy - across.sum(axis=1)) / ((n - 1) * m)
    )
    without_reference = (
        xx / (n * (n - 1))
        + (yy - 2 * among.sum(axis=1)) / ((m - 1) * (m - 2))
        - 2 * (xy - across.sum(axis=0)) / (n * (m - 1))
    )
    return without_picture, without_reference


def kid_margin(features: np.ndarray, references: np.ndarray, base: np.ndarray | None = None) -> float | None:
    """Half the width of a 95 % interval of KID, or of its difference from the KID of `base`; None below 3 pictures.

    A jackknife (Efron, Stein: The Jackknife Estimate of Variance, 1981) over pictures and over references. Bootstrap
    samples hold pictures twice, and a picture is so like itself that their MMD is too large. With `base`, whose rows
    are of the same prompts and seeds as those of `features`, a pair is left out at a time, and what both share counts
    once.
    """
    if min(len(features), len(references)) < 3:
        return None
    parts = _kid_without_one(features, references)
    if base is not None:
        parts = tuple(x - y for x, y in zip(parts, _kid_without_one(base, references), strict=True))  # type: ignore[assignment]
    variance = sum((len(part) - 1) / len(part) * float(((part - part.mean()) ** 2).sum()) for part in parts)
    return NORMAL_975 * math.sqrt(variance)


def fid(features: np.ndarray, references: np.ndarray) -> float:
    """Fréchet distance of two normal distributions fitted to the features; at least 2 pictures on each side."""
    metric = FrechetInceptionDistance(feature=_AsTheyAre(features.shape[1])).set_dtype(torch.float64)
    metric.update(torch.from_numpy(references).double(), real=True)
    metric.update(torch.from_numpy(features).double(), real=False)
    return float(metric.compute())
