"""How sure a mean is: percentile intervals by resampling, seeded, so that a second run prints the same figures.

Pictures come in prompts times seeds, and those of one prompt are alike. So whole prompts are what is drawn, or left
out; where there is a single prompt, its pictures are.
"""

from __future__ import annotations

import dataclasses

import numpy as np

LEVEL = 0.95
_AT_ONCE = 4_000_000  # draws held in memory


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % confidence interval, None where there is none.

    It is over `n` pictures; the interval rests on `units` prompts or pictures, whichever `unit` says.
    """

    mean: float
    interval: tuple[float, float] | None
    n: int
    unit: str
    units: int
    method: str

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "mean": self.mean, "interval": list(self.interval) if self.interval else None, "n": self.n,
            "unit": self.unit, "units": self.units, "interval_method": self.method if self.interval else None,
        }  # fmt: skip


def units_of(prompts: np.ndarray) -> tuple[str, np.ndarray]:
    """What is resampled, `prompts` or `pictures`, and the number of each picture's unit, from 0 without a gap.

    Args:
        prompts: of each picture [n], its prompt, as anything that can be compared.
    """
    _, numbers = np.unique(prompts, return_inverse=True)
    return ("prompts", numbers) if numbers.max() > 0 else ("pictures", np.arange(len(prompts)))


def bootstrap_mean(values: np.ndarray, prompts: np.ndarray, resamples: int, seed: int) -> Estimate:
    """Mean of `values` [n], each of a picture of one of `prompts` [n], with the percentile interval of resampled means.

    A resample draws as many units as there are, with replacement, each with all its pictures (Davison, Hinkley:
    Bootstrap Methods and their Application, 1997, section 3.8). A single picture has no interval.
    """
    unit, numbers = units_of(prompts)
    counts = np.bincount(numbers)
    sums = np.bincount(numbers, weights=values)
    n, units, method = len(values), len(counts), f"bootstrap over {unit}"
    if units < 2:
        return Estimate(float(values.mean()), None, n, unit, units, method)
    rng = np.random.default_rng(seed)
    means: list[np.ndarray] = []
    left = resamples
    while left:
        rows = min(left, max(1, _AT_ONCE // units))
        drawn = rng.integers(0, units, (rows, units))
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
        left -= rows
    low, high = np.quantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(values.mean()), (float(low), float(high)), n, unit, units, method)
