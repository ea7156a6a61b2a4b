"""The training pictures: where they come from, their captions, and how they become square tensors."""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

from sd3.common.command_line import UserError
from sd3.common.memory import uncollected
from sd3.common.seen import SeenFiles
from sd3.data.decoding import ImageError, decode, image_size
from sd3.data.facts import MOST_WORKERS, in_parallel, processors
from sd3.data.known_images import recall
from sd3.data.training_data import Origin, TrainingImage, image_of_file, read_training_data
from sd3.native.options import data_flags
from sd3.native.randomness import seed_of

FLIPS = (False, True)
CROPS = torch.Generator()  # seeded anew for each item


@dataclass(frozen=True)
class View:
    """One square of one picture: `content` gives the file's bytes, `crop` the square's place from 0 to 1 or None."""

    name: str
    content: Callable[[], bytes]
    crop: tuple[float, float] | None  # of top and left edge; None: the middle
    flip: bool = False
    origin: Origin | None = None  # where the bytes are

    def key(self, resolution: int, digest: str, square: bool) -> str:
        """Identity of the square's pixels: the content's digest and what is done to it.

        `square`: the picture is one, and there is but one place to cut.
        """
        return f"{digest} {resolution} {None if square else self.crop} {self.flip}"

    def pixels(self, resolution: int) -> torch.Tensor:
        """Pixels [3, resolution, resolution] from -1 to 1.

        Raises:
            UserError: the file is not an image.
        """
        return to_pixels(squares([self], resolution)[0])


def squares(views: Sequence[View], resolution: int) -> list[Image.Image]:
    """The squares, with `resolution` pixels a side, of views of one image, which is decoded once.

    As the pinned scripts: the shorter side is scaled to the resolution (bilinear), then a square is cut out.

    Raises:
        UserError: the file is not an image.
    """
    try:
        image = decode(views[0].content())
    except ImageError as error:
        raise UserError(f"{views[0].name} cannot be read as an image ({error}); fix or remove it.") from None
    image = transforms.resize(image, resolution, InterpolationMode.BILINEAR)
    return [_square(image, view, resolution) for view in views]


def _square(image: Image.Image, view: View, resolution: int) -> Image.Image:
    if view.crop is None:
        image = transforms.center_crop(image, [resolution])
    else:
        top, left = (
            int(place * (side - resolution + 1)) for place, side in zip(view.crop, image.size[::-1], strict=True)
        )
        image = transforms.crop(image, top, left, resolution, resolution)
    return transforms.hflip(image) if view.flip else image


def to_pixels(square: Image.Image) -> torch.Tensor:
    """Pixels [3, H, W] from -1 to 1."""
    return transforms.normalize(transforms.to_tensor(square), [0.5], [0.5])


class Squares:
    """Squares of views, decoded by threads ahead of the VAE that takes them; only a few wait at any time."""

    def __init__(self, views: Sequence[View], resolution: int) -> None:
        """The views that may be asked for."""
        self.views, self.resolution = views, resolution
        self._found: Iterator[list[Image.Image]] = iter(())
        self._taken: Iterator[Image.Image] = iter(())

    def announce(self, places: Sequence[int]) -> None:
        """The places, in `views`, of the squares that will be taken, in this order."""
        order = (self.views[place] for place in places)
        # What follows one another and is of one image is decoded once.
        groups = (list(group) for _, group in itertools.groupby(order, key=lambda view: view.content))
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # of this machine, which share its cores
        work = functools.partial(squares, resolution=self.resolution)
        self._found = in_parallel(work, groups, max(1, min(processors() // ranks, MOST_WORKERS)))
        self._taken = itertools.chain.from_iterable(self._found)

    def take(self, count: int) -> torch.Tensor:
        """Pixels [count, 3, resolution, resolution] of the next squares; raises UserError as `squares` does."""
        return torch.stack([to_pixels(square) for square in itertools.islice(self._taken, count)])

    def close(self) -> None:
        """Decode no more."""
        if isinstance(self._found, Generator):
            self._found.close()


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


def identities(views: Sequence[View], seen: SeenFiles) -> dict[Callable[[], bytes], tuple[str, bool]]:
    """What `identity` gives of each `content`; files that a check has looked at are not read again."""
    distinct = list({view.content: view for view in views}.values())
    facts = recall(seen, [view.origin for view in distinct])
    found = {
        view.content: (known.digest, known.square)
        for view, known in zip(distinct, facts, strict=True)
        if known and not known.problem
    }
    others = [view.content for view in distinct if view.content not in found]
    return found | dict(zip(others, in_parallel(identity, others), strict=True))


@dataclass(frozen=True)
class Sample:
    """One item of the data set: its views (plain, and mirrored where flips are on) and its caption."""

    views: tuple[View, ...]
    caption: str


def _crop(options: argparse.Namespace, what: str, index: int) -> tuple[float, float] | None:
    """Where the square lies in the picture: the middle, or drawn once by seed for each item."""
    if options.center_crop:
        return None
    CROPS.manual_seed(seed_of(options.seed or 0, f"crop of {what}", index))
    top, left = torch.rand(2, generator=CROPS).tolist()
    return top, left


def _views(
    options: argparse.Namespace, image: TrainingImage, what: str, index: int, flips: bool
) -> tuple[View, ...]:
    crop = _crop(options, what, index)
    return tuple(View(image.name, image.content, crop, flip, image.origin) for flip in FLIPS[: 1 + flips])


def instance_samples(options: argparse.Namespace) -> list[Sample]:
    """The images of the subject with their captions, each `--repeats` times.

    Raises:
        UserError: the data cannot be read, or lack a column that was asked for.
    """
    found = read_training_data(data_flags(options)).images
    repeated = [image for image in found for _ in range(options.repeats)]
    with uncollected():
        return [
            Sample(
                _views(options, image, "instance", index, options.random_flip),
                image.caption or options.instance_prompt,
            )
            for index, image in enumerate(repeated)
        ]


def class_samples(options: argparse.Namespace, files: list[Path]) -> list[Sample]:
    """The pictures that prior preservation holds on to; the pinned scripts never mirror them."""
    return [
        Sample(_views(options, image_of_file(file), "class", index, False), options.class_prompt)
        for index, file in enumerate(files)
    ]
