"""What a run will be trained on, a line per fact: whatever is altered or left out is named in it.

The launcher prints the lines before the run and keeps all of it in `data.json` of the run directory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sd3.data.caption_lengths import EncoderCut, cut_sentence
from sd3.data.facts import ImageFacts
from sd3.data.training_data import TrainingData, TrainingImage

SHOWN = 3  # names in a line; the file has them all


@dataclass(frozen=True)
class ImageSet:
    """Good images of one kind (`name`: "images" or "class images") and what happens to them."""

    name: str
    count: int
    enlarged: list[str]
    converted: dict[str, list[str]]
    left_out: list[tuple[str, str]]

    @classmethod
    def of(cls, name: str, data: TrainingData, facts: Sequence[ImageFacts], resolution: int) -> ImageSet:
        """`facts`: of the data's images, in their order; `resolution`: side of the squares in pixels."""
        pairs = [(image, each) for image, each in zip(data.images, facts, strict=True) if each.problem is None]
        converted: dict[str, list[str]] = {}
        for image, each in pairs:
            for change in each.changes:
                converted.setdefault(change, []).append(_short(image))
        enlarged = [_short(image) for image, each in pairs if min(each.width, each.height) < resolution]
        return cls(name, len(data.images), enlarged, converted, data.left_out)

    def lines(self, resolution: int) -> list[str]:
        """Facts beside the count, each in a sentence."""
        found = []
        if self.enlarged:
            found.append(f"{self._of(self.enlarged)} smaller than {resolution} pixels, enlarged{_names(self.enlarged)}")
        for change, names in self.converted.items():
            found.append(f"{self._of(names)} converted: {change}{_names(names)}")
        reasons: dict[str, list[str]] = {}
        for name, why in self.left_out:
            reasons.setdefault(why, []).append(name)
        for why, names in reasons.items():
            found.append(f"{len(names)} left out, {why}{_names(names)}")
        return [f"{self.name}: {line}" for line in found]

    def _of(self, names: Sequence[str]) -> str:
        return f"{len(names)} of {self.count}"

    def as_json(self) -> dict[str, Any]:
        """All of it, with every name."""
        return {
            "count": self.count,
            "enlarged": self.enlarged,
            "converted": self.converted,
            "left_out": [{"name": name, "why": why} for name, why in self.left_out],
        }


@dataclass(frozen=True)
class DataSummary:
    """The data of a run. `cuts`: what the text encoders lose of `captions`, which are those that are trained on."""

    resolution: int
    instance: ImageSet
    captions: int
    distinct_captions: int
    without_caption: list[str]
    class_images: ImageSet | None = None
    cuts: list[EncoderCut] = field(default_factory=list)

    def lines(self) -> list[str]:
        """A line per fact."""
        captions = "1 caption" if self.distinct_captions == 1 else f"{self.distinct_captions} distinct captions"
        images = "1 image" if self.instance.count == 1 else f"{self.instance.count} images"
        found = [f"{images}, {captions}", *self.instance.lines(self.resolution)]
        if self.without_caption:
            found.append(
                f"captions: {len(self.without_caption)} of {self.instance.count} images have none and take "
                f"--instance_prompt{_names(self.without_caption)}"
            )
        if self.class_images:
            found.append(f"class images: {self.class_images.count} found")
            found += self.class_images.lines(self.resolution)
        if sentence := cut_sentence(self.cuts, self.captions):
            found.append(f"captions: {sentence.rstrip('.')}")
        return found

    def as_json(self) -> dict[str, Any]:
        """What `data.json` of the run directory holds."""
        return {
            "resolution": self.resolution,
            "images": self.instance.as_json(),
            "distinct_captions": self.distinct_captions,
            "without_caption": self.without_caption,
            "class_images": self.class_images.as_json() if self.class_images else None,
            "cut_captions": [cut._asdict() for cut in self.cuts],
        }


def _short(image: TrainingImage) -> str:
    """A file's name without its folders; a row as it is named in messages."""
    return image.origin[0].name if image.origin and image.origin[1] is None else image.name


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f" ({', '.join(names[:SHOWN])}{more})"
