"""How sure a mean is: percentile intervals by resampling, seeded, so that a second run prints the same figures."""

from __future__ import annotations

import dataclasses

import numpy as np

LEVEL = 0.95
_AT_ONCE = 4_000_000  # draws held in memory


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A figure, its 95 % confidence interval (None where there is none), and how many pictures it rests on."""

    mean: float
    interval: tuple[float, float] | None
    n: int
    method: str

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "mean": self.mean, "interval": list(self.interval) if self.interval else None, "n": self.n,
            "interval_method": self.method if self.interval else None,
        }  # fmt: skip


def bootstrap_mean(values: np.ndarray, resamples: int, seed: int) -> Estimate:
    """Mean of `values` [n] with the percentile interval of `resamples` means of n values drawn with replacement.

    Efron, Tibshirani: An Introduction to the Bootstrap, 1993, chapter 13. A single value has no interval.
    """
    n = len(values)
    if n < 2:
        return Estimate(float(values.mean()), None, n, "bootstrap")
    rng = np.random.default_rng(seed)
    means: list[np.ndarray] = []
    left = resamples
    while left:
        rows = min(left, max(1, _AT_ONCE // n))
        means.append(values[rng.integers(0, n, (rows, n))].mean(axis=1))
        left -= rows
    low, high = np.quantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(values.mean()), (float(low), float(high)), n, "bootstrap")
