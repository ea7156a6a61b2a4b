"""The training pictures: where they come from, their captions, and how they become square tensors."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

from sd3.common.command_line import UserError
from sd3.data.decoding import ImageError, decode, image_size
from sd3.data.training_data import read_training_data
from sd3.native.options import data_flags
from sd3.native.randomness import seed_of

FLIPS = (False, True)


@dataclass(frozen=True)
class View:
    """One square of one picture: `content` gives the file's bytes, `crop` the square's place from 0 to 1 or None."""

    name: str
    content: Callable[[], bytes]
    crop: tuple[float, float] | None  # of top and left edge; None: the middle
    flip: bool = False

    def key(self, resolution: int, digest: str, square: bool) -> str:
        """Identity of the square's pixels: the content's digest and what is done to it.

        `square`: the picture is one, and there is but one place to cut.
        """
        return f"{digest} {resolution} {None if square else self.crop} {self.flip}"

    def pixels(self, resolution: int) -> torch.Tensor:
        """Pixels [3, resolution, resolution] from -1 to 1.

        As the pinned scripts: the shorter side is scaled to the resolution (bilinear), then a square is cut out.

        Raises:
            UserError: the file is not an image.
        """
        try:
            image = decode(self.content())
        except ImageError as error:
            raise UserError(f"{self.name} cannot be read as an image ({error}); fix or remove it.") from None
        image = transforms.resize(image, resolution, InterpolationMode.BILINEAR)
        if self.crop is None:
            image = transforms.center_crop(image, [resolution])
        else:
            top, left = (
                int(place * (side - resolution + 1)) for place, side in zip(self.crop, image.size[::-1], strict=True)
            )
            image = transforms.crop(image, top, left, resolution, resolution)
        if self.flip:
            image = transforms.hflip(image)
        return transforms.normalize(transforms.to_tensor(image), [0.5], [0.5])


def identity(content: Callable[[], bytes]) -> tuple[str, bool]:
    """The SHA-256 of a file, in hexadecimal, and whether the picture is square.

    All views of it have the same `content`, so reading it once will do.
    """
    data = content()
    try:
        width, height = image_size(data)
        square = width == height
    except ImageError:
        square = False  # decoding will name the fault
    return hashlib.sha256(data).hexdigest(), square


@dataclass(frozen=True)
class Sample:
    """One item of the data set: its views (plain, and mirrored where flips are on) and its caption."""

    views: tuple[View, ...]
    caption: str


def _crop(options: argparse.Namespace, what: str, index: int) -> tuple[float, float] | None:
    """Where the square lies in the picture: the middle, or drawn once by seed for each item."""
    if options.center_crop:
        return None
    numbers = torch.Generator().manual_seed(seed_of(options.seed or 0, f"crop of {what}", index))
    top, left = torch.rand(2, generator=numbers).tolist()
    return top, left


def _views(
    options: argparse.Namespace, name: str, content: Callable[[], bytes], what: str, index: int, flips: bool
) -> tuple[View, ...]:
    crop = _crop(options, what, index)
    return tuple(View(name, content, crop, flip) for flip in FLIPS[: 1 + flips])


def instance_samples(options: argparse.Namespace) -> list[Sample]:
    """The images of the subject with their captions, each `--repeats` times.

    Raises:
        UserError: the data cannot be read, or lack a column that was asked for.
    """
    found = read_training_data(data_flags(options)).images
    repeated = [image for image in found for _ in range(options.repeats)]
    return [
        Sample(
            _views(options, image.name, image.content, "instance", index, options.random_flip),
            image.caption or options.instance_prompt,
        )
        for index, image in enumerate(repeated)
    ]


def class_samples(options: argparse.Namespace, files: list[Path]) -> list[Sample]:
    """The pictures that prior preservation holds on to; the pinned scripts never mirror them."""
    return [
        Sample(_views(options, str(file), file.read_bytes, "class", index, False), options.class_prompt)
        for index, file in enumerate(files)
    ]
