"""The figures of a comparison as one dictionary: what metrics.json holds, and what table and report show."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from sd3.evaluation.bootstrap import Estimate, bootstrap_mean, units_of
from sd3.evaluation.candidates import PictureSet
from sd3.evaluation.measure import Measured
from sd3.evaluation.metrics import fid, kid, kid_margin

FORMAT = 3  # of metrics.json; raised when a key changes its meaning
SEED = 0  # of the bootstrap
PACKAGES = ("torch", "torchvision", "transformers", "torchmetrics", "numpy", "pillow")


@dataclasses.dataclass(frozen=True)
class _Figures:
    sets: Sequence[PictureSet]
    measured: Measured
    metrics: Sequence[str]
    resamples: int
    prompts: np.ndarray  # of each picture
    captions: np.ndarray | None  # of each reference, where they are known

    def of_pictures(self, candidate: int, where: np.ndarray | slice, base: int | None = None) -> dict[str, Any]:
        """Metrics that each picture has, over the pictures `where`; with `base`, the difference over pairs."""
        return {
            metric: bootstrap_mean(
                values[candidate][where] - (0 if base is None else values[base][where]), self.prompts[where],
                self.resamples, SEED,
            ).as_dict()
            for metric, values in self.measured.values.items()
        }  # fmt: skip

    def of_sets(self) -> list[dict[str, Estimate]]:
        """KID and FID of each candidate."""
        references = self.measured.kid_references
        found: list[dict[str, Estimate]] = []
        for features in self.measured.kid_features if references is not None else []:
            figures = {}
            if "kid" in self.metrics:
                figures["kid"] = self._of_set(
                    kid(features, references, self.prompts, self.captions),
                    kid_margin(features, references, self.prompts, captions=self.captions),
                )
            if "fid" in self.metrics:
                figures["fid"] = self._of_set(fid(features, references), None)
            found.append(figures)
        return found

    def set_differences(self, of_sets: list[dict[str, Estimate]], candidate: int) -> dict[str, Any]:
        """KID and FID of a candidate less those of the first one."""
        if not of_sets:
            return {}
        features, references = self.measured.kid_features, self.measured.kid_references
        found = {}
        for metric, ours in of_sets[candidate].items():
            margin = None
            if metric == "kid":
                margin = kid_margin(features[candidate], references, self.prompts, features[0], self.captions)
            found[metric] = self._of_set(ours.mean - of_sets[0][metric].mean, margin).as_dict()
        return found

    def _of_set(self, value: float, margin: float | None) -> Estimate:
        unit, numbers = units_of(self.prompts)
        interval = None if margin is None else (value - margin, value + margin)
        return Estimate(
            value, interval, len(numbers), unit, int(numbers.max()) + 1, f"jackknife over {unit} and references"
        )


def summarize(
    sets: Sequence[PictureSet], measured: Measured, metrics: Sequence[str], text_of: Callable[[str], str],
    resamples: int, captions: Sequence[str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """All figures: of each candidate, of each prompt, and of each candidate against the first one.

    Args:
        sets: aligned, the base first.
        measured: from `measure`, for the same sets.
        metrics: names, in the order of display.
        text_of: the text that CLIP-T compares with, from a prompt.
        resamples: of the bootstrap.
        captions: of each reference image of KID, where they are known.
    """
    prompts_of_pictures = np.array([prompt for prompt, _ in sets[0].keys()])
    captions_of_references = np.array(captions) if captions is not None else None
    figures = _Figures(sets, measured, metrics, resamples, prompts_of_pictures, captions_of_references)
    of_sets = figures.of_sets()
    everywhere = slice(None)
    candidates = []
    for number, pictures in enumerate(sets):
        whole = figures.of_pictures(number, everywhere)
        if of_sets:
            whole |= {metric: estimate.as_dict() for metric, estimate in of_sets[number].items()}
        candidates.append({"label": pictures.label, "pictures": len(pictures.paths), **_origin(pictures),
                           "metrics": _ordered(whole, metrics)})  # fmt: skip
    differences = [
        {
            "label": sets[number].label, "base": sets[0].label,
            "metrics": _ordered(
                figures.of_pictures(number, everywhere, base=0) | figures.set_differences(of_sets, number), metrics
            ),
        }
        for number in range(1, len(sets))
    ]  # fmt: skip
    prompts = []
    for prompt in dict.fromkeys(prompts_of_pictures.tolist()):
        where = np.flatnonzero(prompts_of_pictures == prompt)
        prompts.append({
            "prompt": prompt, "clip_text": text_of(prompt), "seeds": [sets[0].recipes[i].seed for i in where],
            "candidates": [
                {"label": s.label, "metrics": figures.of_pictures(number, where)} for number, s in enumerate(sets)
            ],
            "differences": [
                {"label": s.label, "metrics": figures.of_pictures(number, where, base=0)}
                for number, s in enumerate(sets)
                if number
            ],
        })  # fmt: skip
    return {
        "format": FORMAT, "metrics": list(metrics), "candidates": candidates, "differences": differences,
        "prompts": prompts, "feature_models": measured.models,
        "notes": [*measured.notes, *_cautions(figures)],
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }  # fmt: skip


def _ordered(found: dict[str, Any], metrics: Sequence[str]) -> dict[str, Any]:
    return {metric: found[metric] for metric in metrics if metric in found}


def _origin(pictures: PictureSet) -> dict[str, Any]:
    """Model and settings of a set, as its recipes have them; a list where they are not all the same."""
    names = ("model", "model_hash", "lora", "lora_hash", "lora_scale", "steps", "guidance_scale", "height", "width",
             "dtype", "max_sequence_length")  # fmt: skip
    found = {}
    for name in names:
        values = list(dict.fromkeys(getattr(recipe, name) for recipe in pictures.recipes))
        found[name] = values[0] if len(values) == 1 else values
    return found


def _cautions(figures: _Figures) -> list[str]:
    """What the reader has to know before trusting KID and FID."""
    references = figures.measured.kid_references
    if references is None:
        return []
    generated, dimension = len(figures.sets[0].paths), references.shape[1]
    notes = []
    if "fid" in figures.metrics:
        smaller = min(generated, len(references))
        if smaller <= dimension:
            notes.append(
                f"FID rests on {generated} pictures and {len(references)} references of {dimension} features each: a "
                "covariance of full rank needs more pictures than features, so the value is far too high. Compare it "
                "between candidates of this report only, and rather look at KID."
            )
        notes.append("FID has no interval: it is biased by the number of pictures, and resampling adds to the bias.")
    notes.append("KID and FID are comparable with published ones only if features and preprocessing are the same.")
    return notes
