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


class _Kernels:
    """The kernel of each picture with each other one (`within` [n, n]), with the references (`across` [n, m]), and of
    those (`among` [m, m]); that of a picture with itself is 0, for an unbiased estimate leaves it out."""

    def __init__(self, features: np.ndarray, references: np.ndarray) -> None:
        self.within, self.across = _kernel(features, features), _kernel(features, references)
        self.among = _kernel(references, references)
        np.fill_diagonal(self.within, 0)
        np.fill_diagonal(self.among, 0)

    def mmd(self) -> float:
        """The unbiased squared MMD."""
        n, m = self.across.shape
        return float(
            self.within.sum() / (n * (n - 1)) + self.among.sum() / (m * (m - 1)) - 2 * self.across.sum() / (n * m)
        )

    def without_unit(self, units: np.ndarray) -> np.ndarray:
        """The same without each unit [number of units]; `units` [n] has the number of each picture's."""
        n, m = self.across.shape
        left = n - np.bincount(units)
        inside = units[:, None] == units
        lost = 2 * np.bincount(units, self.within.sum(axis=1)) - np.bincount(units, (self.within * inside).sum(axis=1))
        return (
            (self.within.sum() - lost) / (left * (left - 1))
            + self.among.sum() / (m * (m - 1))
            - 2 * (self.across.sum() - np.bincount(units, self.across.sum(axis=1))) / (left * m)
        )

    def without_reference(self) -> np.ndarray:
        """The same without each reference [m]."""
        n, m = self.across.shape
        return (
            self.within.sum() / (n * (n - 1))
            + (self.among.sum() - 2 * self.among.sum(axis=1)) / ((m - 1) * (m - 2))
            - 2 * (self.across.sum() - self.across.sum(axis=0)) / (n * (m - 1))
        )


def kid(features: np.ndarray, references: np.ndarray) -> float:
    """Kernel inception distance: the unbiased squared MMD of all pictures under the kernel (x.y / dimension + 1)^3.

    It can be below zero. At least 2 pictures are needed on each side.
    """
    return _Kernels(features, references).mmd()


def kid_margin(
    features: np.ndarray, references: np.ndarray, prompts: np.ndarray, base: np.ndarray | None = None
) -> float | None:
    """Half the width of a 95 % interval of KID, or of its difference from the KID of `base`; None for too few pictures.

    A jackknife (Efron, Stein: The Jackknife Estimate of Variance, 1981) over prompts, or over pictures where `prompts`
    [n] are all the same, and over references. Bootstrap samples hold pictures twice, and a picture is so like itself
    that their MMD is too large. With `base`, whose rows are of the same prompts and seeds as those of `features`, both
    lose the same unit at a time, and what they share counts once.
    """
    _, units = units_of(prompts)
    # What is left has to have two pictures on each side, or there is no pair to compare.
    if min(len(features) - np.bincount(units).max(), len(references) - 1) < 2:
        return None
    ours = _Kernels(features, references)
    parts = [ours.without_unit(units), ours.without_reference()]
    if base is not None:
        theirs = _Kernels(base, references)
        parts = [parts[0] - theirs.without_unit(units), parts[1] - theirs.without_reference()]
    variance = sum((len(part) - 1) / len(part) * float(((part - part.mean()) ** 2).sum()) for part in parts)
    return NORMAL_975 * math.sqrt(variance)


def fid(features: np.ndarray, references: np.ndarray) -> float:
    """Fréchet distance of two normal distributions fitted to the features; at least 2 pictures on each side."""
    metric = FrechetInceptionDistance(feature=_AsTheyAre(features.shape[1])).set_dtype(torch.float64)
    metric.update(torch.from_numpy(references).double(), real=True)
    metric.update(torch.from_numpy(features).double(), real=False)
    return float(metric.compute())
