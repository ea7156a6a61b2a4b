"""The report: one HTML file that holds everything it shows and asks for nothing else."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from sd3.common import pages
from sd3.common.files import write_text
from sd3.evaluation.candidates import PictureSet
from sd3.evaluation.images import ImageSource, decode
from sd3.evaluation.names import HIGHER_IS_BETTER, PER_PICTURE, TITLES
from sd3.evaluation.table import cell, number, verdict

THUMBNAIL = 224  # pixels of the longer side; twice what most screens show
MOST_THUMBNAILS = 1200  # about 12 MB; prompts beyond have their figures and no pictures
COLOURS = 6  # that the template has for candidates
MEANINGS = {
    "clip-t": "Prompt fidelity: cosine of the CLIP embeddings of picture and prompt.",
    "clip-i": "Subject fidelity: mean cosine of CLIP embeddings with each real picture of the subject.",
    "dino": "Subject fidelity: the same with DINO, which tells individuals of one class apart better.",
    "kid": "Distance from the reference pictures: squared MMD of features, 0 for the same distribution.",
    "fid": "Distance from the reference pictures: between normal distributions fitted to features.",
}


def thumbnail(source: ImageSource) -> str:
    """A data: address with a small JPEG of the picture.

    Raises:
        UserError: the picture cannot be read.
    """
    image = decode(source.name, source.read())
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=82, optimize=True)
    return pages.data_address(stream.getvalue(), "image/jpeg")


class _Scale:
    """From figures to percent of the width of a strip."""

    def __init__(self, estimates: Sequence[dict[str, Any]]) -> None:
        values = [value for each in estimates for value in (each["mean"], *(each["interval"] or ()))]
        low, high = min(values), max(values)
        margin = 0.06 * (high - low) or max(abs(high), 1.0) * 0.05
        self._low, self._width = low - margin, high - low + 2 * margin

    def place(self, value: float) -> float:
        return round(100 * (value - self._low) / self._width, 2)

    def strip(self, estimate: dict[str, Any]) -> dict[str, Any]:
        """The figure as text, and where its dot and its interval lie."""
        low, high = (self.place(value) for value in estimate["interval"] or (estimate["mean"], estimate["mean"]))
        return {
            "text": _minus(number(estimate["mean"])), "full": _minus(cell(estimate)),
            "interval": _minus(" to ".join(number(value) for value in estimate["interval"] or ())),
            "dot": self.place(estimate["mean"]), "left": low, "width": round(high - low, 2), "n": estimate["n"],
        }  # fmt: skip


def _minus(text: str) -> str:
    """Hyphens of figures as the minus sign, which is as wide as a plus."""
    return text.replace("-", "\N{MINUS SIGN}")


def _figures(metric: str, scale: _Scale, candidates: Sequence[Any], differences: Sequence[Any]) -> dict[str, Any]:
    """A metric of all candidates on one scale, and what the differences from the first one say."""
    return {
        "name": TITLES[metric],
        "rows": [
            {"label": each["label"], "colour": place % COLOURS, **scale.strip(each["metrics"][metric])}
            for place, each in enumerate(candidates)
        ],
        "differences": [
            {"label": each["label"], "base": candidates[0]["label"],
             "text": _minus(cell(each["metrics"][metric], signed=True)),
             "verdict": verdict(metric, each["metrics"][metric])}
            for each in differences
        ],
    }  # fmt: skip


def _cards(results: dict[str, Any]) -> list[dict[str, Any]]:
    """One for each metric."""
    return [
        {
            "meaning": MEANINGS[metric], "higher": HIGHER_IS_BETTER[metric],
            **_figures(
                metric, _Scale([each["metrics"][metric] for each in results["candidates"]]), results["candidates"],
                results["differences"],
            ),
        }
        for metric in results["metrics"]
    ]  # fmt: skip


def _prompts(results: dict[str, Any], sets: Sequence[PictureSet]) -> list[dict[str, Any]]:
    """One for each prompt: pictures of all candidates, and the metrics that every picture has."""
    metrics = [metric for metric in results["metrics"] if metric in PER_PICTURE]
    scales = {
        metric: _Scale([c["metrics"][metric] for prompt in results["prompts"] for c in prompt["candidates"]])
        for metric in metrics
    }
    index = {key: number for number, key in enumerate(sets[0].keys())}
    room = MOST_THUMBNAILS
    shown = []
    for prompt in results["prompts"]:
        room -= len(prompt["seeds"]) * len(sets)
        numbers = [index[prompt["prompt"], seed] for seed in prompt["seeds"]] if room >= 0 else []
        shown.append({
            "prompt": prompt["prompt"], "clip_text": prompt["clip_text"], "seeds": prompt["seeds"],
            "candidates": [
                {"label": pictures.label, "colour": place % COLOURS,
                 "pictures": [thumbnail(ImageSource(str(pictures.paths[i]), pictures.paths[i])) for i in numbers]}
                for place, pictures in enumerate(sets)
            ],
            "metrics": [
                _figures(metric, scale, prompt["candidates"], prompt["differences"]) for metric, scale in scales.items()
            ],
        })  # fmt: skip
    return shown


def render(results: dict[str, Any], sets: Sequence[PictureSet], subject: Sequence[ImageSource]) -> str:
    """The HTML text.

    Args:
        results: from `summarize`, with `settings` and `split`.
        sets: the same sets, aligned.
        subject: real pictures of the subject, none if there are none.

    Raises:
        UserError: a picture cannot be read.
    """
    return pages.render(
        Path(__file__).with_name("report.html.jinja"), results=results, cards=_cards(results),
        prompts=_prompts(results, sets), subject=[thumbnail(source) for source in subject[:12]], colours=COLOURS,
    )  # fmt: skip


def write_report(
    path: Path, results: dict[str, Any], sets: Sequence[PictureSet], subject: Sequence[ImageSource]
) -> None:
    """Write what `render` makes; the file appears whole or not at all. Raises as `render` does."""
    write_text(path, render(results, sets, subject))
