"""The figures against computations of our own that share no code with them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from sd3.evaluation.bootstrap import bootstrap_mean
from sd3.evaluation.metrics import (
    fid,
    kid,
    kid_margin,
    prompt_fidelity,
    subject_fidelity,
)


def features(n: int, dimension: int = 6, seed: int = 0, shift: float = 0.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(n, dimension)) + shift).astype(np.float32)


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x.astype(float), y.astype(float)
    return float((x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum()))


def each_its_own(n: int) -> np.ndarray:
    """Prompts of n pictures, no two the same."""
    return np.arange(n)


def mmd(x: np.ndarray, y: np.ndarray, prompts: Sequence[object] = (), captions: Sequence[object] = ()) -> float:
    """Unbiased squared MMD, term by term as Binkowski et al. write it; of pairs of one prompt, none counts where there
    are two prompts or more."""

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return (float(a.astype(float) @ b.astype(float)) / len(a) + 1) ** 3

    def mean(a: np.ndarray, b: np.ndarray, of_a: list[object], of_b: list[object]) -> float:
        pairs = itertools.product(zip(a, of_a, strict=True), zip(b, of_b, strict=True))
        return float(np.mean([k(p, q) for (p, i), (q, j) in pairs if i != j]))

    ours: list[object] = list(prompts) if len(set(prompts)) > 1 else [("image", i) for i in range(len(x))]
    known = len(set(prompts)) > 1 and len(set(captions)) > 1
    theirs: list[object] = list(captions) if known else [("reference", i) for i in range(len(y))]
    return mean(x, x, ours, ours) + mean(y, y, theirs, theirs) - 2 * mean(x, y, ours, theirs)


def root(matrix: np.ndarray) -> np.ndarray:
    """Square root of a symmetric positive semidefinite matrix."""
    values, vectors = np.linalg.eigh(matrix)
    return vectors @ np.diag(np.sqrt(np.clip(values, 0, None))) @ vectors.T


def frechet(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x.astype(float), y.astype(float)
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    middle = root(root(a) @ b @ root(a))
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * np.trace(middle))


def test_clip_t_is_the_cosine_with_the_pictures_own_text() -> None:
    images, texts, text_of = features(4), features(2, seed=1), np.array([1, 0, 0, 1])
    expected = [cosine(images[i], texts[text_of[i]]) for i in range(4)]
    assert prompt_fidelity(images, texts, text_of) == pytest.approx(expected)


def test_clip_i_and_dino_are_the_mean_over_all_references() -> None:
    images, references = features(3), features(5, seed=1)
    expected = [np.mean([cosine(image, reference) for reference in references]) for image in images]
    assert subject_fidelity(images, references) == pytest.approx(expected)
    assert subject_fidelity(images[:1], images[:1]) == pytest.approx([1.0])


@pytest.mark.parametrize(("n", "m"), [(9, 9), (60, 12), (2, 5)])
def test_kid_is_the_unbiased_mmd_of_all_pictures(n: int, m: int) -> None:
    images, references = features(n, shift=0.5), features(m, seed=1)
    assert kid(images, references) == pytest.approx(mmd(images, references))


def test_kid_is_that_of_torchmetrics_with_one_subset_of_everything() -> None:
    import torch
    from torchmetrics.image.kid import KernelInceptionDistance

    class Kept(torch.nn.Module):
        num_features = 6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    images, references = features(30, shift=0.5), features(30, seed=1)
    metric = KernelInceptionDistance(feature=Kept(), subsets=1, subset_size=30)
    metric.update(torch.from_numpy(references).double(), real=True)
    metric.update(torch.from_numpy(images).double(), real=False)
    assert kid(images, references) == pytest.approx(float(metric.compute()[0]))


PROMPTS = [[0, 1, 2, 3, 4, 5, 6], [3] * 7, ["b", "a", "b", "c", "a", "b", "c"], ["a", "b", "b", "a", "a", "b", "b"]]
CAPTIONS = [[], ["c", "a", "c", "d", "d"], ["a", "b", "c", "d", "e"], ["x"] * 5, ["f", "g", "f", "g", "f"]]


@pytest.mark.parametrize("captions", CAPTIONS)
@pytest.mark.parametrize("prompts", PROMPTS)
def test_kid_is_over_pairs_of_different_prompts(prompts: list[object], captions: list[str]) -> None:
    names = [str(prompt) for prompt in prompts]
    images, references = features(7, shift=0.3), features(5, seed=1)
    found = kid(images, references, np.array(names), np.array(captions) if captions else None)
    assert found == pytest.approx(mmd(images, references, names, captions))


@pytest.mark.parametrize("captions", CAPTIONS)
def test_kid_of_one_prompt_is_that_of_all_pairs_to_the_bit(captions: list[str]) -> None:
    images, references = features(7, shift=0.3), features(5, seed=1)
    known = np.array(captions) if captions else None
    assert kid(images, references, np.array(["a"] * 7), known) == kid(images, references)


@pytest.mark.parametrize("captions", CAPTIONS)
@pytest.mark.parametrize("prompts", PROMPTS)
@pytest.mark.parametrize("paired", [False, True])
def test_the_margin_of_kid_is_the_jackknife_done_by_hand(
    paired: bool, prompts: list[object], captions: list[str]
) -> None:
    """Over whole prompts, of unequal numbers of images, and their references; over images where there is one prompt."""
    images, references = features(7, shift=0.3), features(5, seed=1)
    base = features(7, seed=2) if paired else None
    names, i, j = np.array([str(prompt) for prompt in prompts]), np.arange(7), np.arange(5)
    theirs = np.array(captions)
    known = len(set(names)) > 1 and len(set(captions)) > 1

    def value(keep: np.ndarray, against: np.ndarray) -> float:
        more = names[keep].tolist(), theirs[against].tolist() if known else ()
        ours = mmd(images[keep], references[against], *more)
        return ours - (mmd(base[keep], references[against], *more) if paired else 0)

    def variance(parts: list[float]) -> float:
        return (len(parts) - 1) / len(parts) * float(((np.array(parts) - np.mean(parts)) ** 2).sum()) if parts else 0

    units = [names == name for name in sorted(set(names))] if len(set(names)) > 1 else [i == k for k in i]
    lost = [theirs == name for name in sorted(set(names))] if known else [np.zeros(5, bool)] * len(units)
    others = [theirs == name for name in sorted(set(captions) - set(names))] if known else [j == k for k in j]
    pictures = variance([value(i[~unit], j[~its]) for unit, its in zip(units, lost, strict=True)])
    real = variance([value(i, j[~unit]) for unit in others])
    found = kid_margin(images, references, names, base, theirs if captions else None)
    if known and 2 in (len(set(names)), len(set(captions))):
        assert found is None  # less one, a single prompt is left, or a single one of the references
        return
    assert found == pytest.approx(1.959964 * np.sqrt(pictures + real), rel=1e-5)


def test_too_few_pictures_have_no_margin_of_kid() -> None:
    images, references = features(7), features(5, seed=1)
    assert kid_margin(images[:2], references, each_its_own(2)) is None
    assert kid_margin(images, references[:2], each_its_own(7)) is None
    assert kid_margin(images[:3], references, np.array([0, 0, 1])) is None
    two = np.array(["a", "b"]).repeat(2)  # without either prompt, images and references are of the other one
    assert kid_margin(images[:4], references[:4], two, captions=two) is None


def test_identical_candidates_have_no_difference_in_kid() -> None:
    images, references = features(7), features(5, seed=1)
    assert kid_margin(images, references, each_its_own(7), images) == 0


def test_the_interval_of_kid_covers_its_true_value() -> None:
    """Between distributions that differ; there the jackknife's normal approximation holds."""
    trials, values, margins = 150, [], []
    for trial in range(trials):
        x, y = features(40, 3, seed=2 * trial, shift=1.0), features(40, 3, seed=2 * trial + 1)
        values.append(kid(x, y))
        margins.append(kid_margin(x, y, each_its_own(40)))
    truth = np.mean(values)  # KID is unbiased
    assert 0.88 <= np.mean(np.abs(np.array(values) - truth) <= np.array(margins)) <= 0.99


def test_the_interval_of_kid_covers_its_true_value_where_pictures_of_a_prompt_are_alike() -> None:
    trials, values, margins, narrow = 150, [], [], []
    prompts = np.repeat(np.arange(25), 4)
    for trial in range(trials):
        x = 1 + 0.4 * features(25, seed=3 * trial)[prompts] + 0.2 * features(100, seed=3 * trial + 1)
        y = 0.5 * features(100, seed=3 * trial + 2)
        values.append(kid(x, y, prompts))
        margins.append(kid_margin(x, y, prompts))
        narrow.append(kid_margin(x, y, each_its_own(100)))
    off = np.abs(np.array(values) - np.mean(values))
    assert 0.86 <= np.mean(off <= np.array(margins)) <= 0.99  # a cubic kernel of 25 prompts is not quite normal
    assert np.mean(off <= np.array(narrow)) < 0.75


PER_PROMPT = np.repeat(np.arange(25), 4)


def alike(rng: np.random.Generator, common: np.ndarray) -> np.ndarray:
    """Normal features [100, d] of 25 prompts by 4 seeds, correlated by 0.5 within a prompt; `common` [25, d] is what
    those of a prompt share."""
    return np.sqrt(0.5) * (common[PER_PROMPT] + rng.normal(size=(100, common.shape[1])))


@pytest.mark.parametrize("references", ["others", "of the prompts"])
def test_kid_of_equal_distributions_is_0_and_its_interval_holds_0(references: str) -> None:
    """Of one candidate, and of the difference of two by the same prompts; references of other prompts, or of the same.

    In so many trials mean KID has a standard error of 0.0015 at most, so a bias of 0.005 would show.
    """
    rng, dimension, trials, found = np.random.default_rng(0), 64, 200, []
    captions = None if references == "others" else PER_PROMPT
    for _ in range(trials):
        common = rng.normal(size=(25, dimension))
        ours, base = alike(rng, common), alike(rng, common)
        real = rng.normal(size=(100, dimension)) if captions is None else alike(rng, common)
        value, other = (kid(each, real, PER_PROMPT, captions) for each in (ours, base))
        found.append((
            value, kid_margin(ours, real, PER_PROMPT, captions=captions),
            value - other, kid_margin(ours, real, PER_PROMPT, base, captions), kid(ours, real),
        ))  # fmt: skip
    value, margin, difference, its_margin, all_pairs = np.array(found).T
    for each, half in ((value, margin), (difference, its_margin)):
        assert abs(each.mean()) <= 0.005
        assert each.std() / np.sqrt(trials) < 0.0015
        assert np.mean(np.abs(each) <= half) >= 0.90
    assert abs(all_pairs.mean()) > 0.02  # what pairs of one prompt add, or take away across


@pytest.mark.parametrize("n", [50, 4])  # 4 pictures of 6 features: covariances of too low a rank
def test_fid_is_the_frechet_distance(n: int) -> None:
    images, references = features(n, shift=0.5), features(n + 3, seed=1)
    assert fid(images, references) == pytest.approx(frechet(images, references), rel=1e-6, abs=1e-6)


def test_fid_of_the_same_pictures_is_nothing() -> None:
    assert fid(features(50), features(50)) == pytest.approx(0, abs=1e-9)


def test_the_bootstrap_is_seeded_and_has_the_mean() -> None:
    values = features(30, 1)[:, 0]
    first = bootstrap_mean(values, each_its_own(30), 500, seed=0)
    assert first == bootstrap_mean(values, each_its_own(30), 500, seed=0)
    assert first != bootstrap_mean(values, each_its_own(30), 500, seed=1)
    assert first.mean == pytest.approx(values.mean())
    assert first.interval[0] < first.mean < first.interval[1]


def test_prompts_are_what_is_resampled_and_pictures_where_there_is_one() -> None:
    values = features(12, 1)[:, 0]
    three = bootstrap_mean(values, np.repeat(["b", "a", "c"], 4), 500, seed=0)
    assert (three.n, three.unit, three.units, three.method) == (12, "prompts", 3, "bootstrap over prompts")
    one = bootstrap_mean(values, np.repeat(["a"], 12), 500, seed=0)
    assert (one.n, one.unit, one.units, one.method) == (12, "pictures", 12, "bootstrap over pictures")


def test_each_resample_is_a_mean_over_pictures_of_whole_prompts() -> None:
    """Two prompts, of one and of three pictures: only three means can come up."""
    values, prompts = np.array([8.0, 0.0, 1.0, 2.0]), np.array([0, 1, 1, 1])
    found = bootstrap_mean(values, prompts, 500, seed=0)
    assert found.mean == 11 / 4
    assert found.interval == (1.0, 8.0)


def test_a_single_picture_has_no_interval() -> None:
    assert bootstrap_mean(np.array([0.5]), each_its_own(1), 500, seed=0).as_dict() == {
        "mean": 0.5, "interval": None, "n": 1, "unit": "pictures", "units": 1, "interval_method": None,
    }  # fmt: skip


def test_intervals_cover_the_true_mean_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    trials, covered = 400, 0
    for _ in range(trials):
        low, high = bootstrap_mean(rng.exponential(size=40), np.zeros(40), 400, seed=0).interval
        covered += low <= 1.0 <= high
    assert 0.88 <= covered / trials <= 0.98


def test_intervals_cover_the_mean_of_all_prompts_where_pictures_of_a_prompt_are_alike() -> None:
    """25 prompts of 4 seeds, as the report has them; by pictures alone, the intervals would be too narrow."""
    rng = np.random.default_rng(0)
    prompts = np.repeat(np.arange(25), 4)
    trials, covered, by_pictures = 400, 0, 0
    for _ in range(trials):
        values = 0.3 + rng.normal(0, 0.02, 25)[prompts] + rng.normal(0, 0.01, 100)
        low, high = bootstrap_mean(values, prompts, 1000, seed=0).interval
        covered += low <= 0.3 <= high
        low, high = bootstrap_mean(values, each_its_own(100), 1000, seed=0).interval
        by_pictures += low <= 0.3 <= high
    assert 0.90 <= covered / trials <= 0.99
    assert by_pictures / trials < 0.80


def test_many_values_are_resampled_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    values = features(50, 1)[:, 0]
    whole = bootstrap_mean(values, each_its_own(50), 300, seed=0)
    monkeypatch.setattr("sd3.evaluation.bootstrap._AT_ONCE", 500)
    assert bootstrap_mean(values, each_its_own(50), 300, seed=0) == whole
