"""Reads a scene off a picture of the world, by rules alone: nothing here is learned, so that it can judge what is.

Pixels unlike the background are grouped; each group is compared with every shape drawn at its place and of its area.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sd3.tiny_world.grammar import ATTRIBUTES, BACKGROUNDS, COLOURS, SHAPES, Scene
from sd3.tiny_world.render import SIZE, Plane, coverage

if TYPE_CHECKING:
    from PIL import Image

_UNLIKE = 48.0  # distance in RGB from the background, of 441, from which a pixel is not it
_LEAST_AREA = 40  # pixels; smaller groups are flaws of painting, not shapes
_MOST_AREA = 1400  # pixels; larger ones are no shape of the world
_LEAST_LIKENESS = 0.6  # intersection over union with the best shape; below, it is none
_LARGE = 14.2  # pixels of radius
_OFF_CENTRE = 6.0  # pixels
# Area of each shape at radius 1, from its definition in render.py.
_AREAS = {
    "circle": math.pi, "square": 1.7**2, "triangle": 0.75 * math.sqrt(3) * 1.1**2, "cross": 4 * 0.64 - 0.64**2,
    "ring": math.pi * (1 - 0.44**2), "star": 5 * 1.1**2 * 0.42 * math.sin(math.pi / 5),
}  # fmt: skip


class Found(NamedTuple):
    """One group of pixels."""

    shape: str | None
    likeness: float  # to that shape, 0 to 1
    radius: float
    x: float
    y: float
    colour: NDArray[np.float32]  # [3]


def pixels_of(image: Image.Image) -> NDArray[np.float32]:
    """The picture as numbers [64, 64, 3] of 0 to 255; other sizes are resampled."""
    image = image.convert("RGB")
    if image.size != (SIZE, SIZE):
        image = image.resize((SIZE, SIZE), 4)  # box filter
    return np.asarray(image, np.float32)


def nearest(colour: NDArray[np.float32], names: dict[str, tuple[int, int, int]]) -> str:
    """The name of the colour that is nearest in RGB."""
    return min(names, key=lambda name: float(np.linalg.norm(colour - np.asarray(names[name]))))


def background_of(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """The colour [3] of most of the picture's border."""
    border = np.concatenate([pixels[:3].reshape(-1, 3), pixels[-3:].reshape(-1, 3), pixels[:, :3].reshape(-1, 3),
                             pixels[:, -3:].reshape(-1, 3)])  # fmt: skip
    return np.median(border, axis=0)


def groups(mask: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """The connected groups (by sides) of at least _LEAST_AREA true pixels, as masks."""
    left = set(zip(*(axis.tolist() for axis in np.nonzero(mask)), strict=True))
    found = []
    while left:
        todo, group = [left.pop()], []
        while todo:
            row, column = todo.pop()
            group.append((row, column))
            beside = {(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)} & left
            left -= beside
            todo += beside
        if len(group) >= _LEAST_AREA:
            one = np.zeros_like(mask)
            one[tuple(zip(*group, strict=True))] = True
            found.append(one)
    return found


def _best_shape(cover: Plane) -> Found:
    """The shape most like a group's soft mask."""
    area = float(cover.sum())
    rows, columns = np.mgrid[0:SIZE, 0:SIZE] + 0.5
    x, y = float((cover * columns).sum() / area), float((cover * rows).sum() / area)
    best = Found(None, 0.0, math.sqrt(area / math.pi), x, y, np.zeros(3, np.float32))
    for shape, turn in itertools.product(SHAPES, (-0.1, 0.0, 0.1)):
        radius = math.sqrt(area / _AREAS[shape])
        template = coverage(shape, x, y, radius, turn)
        likeness = float(np.minimum(cover, template).sum() / np.maximum(cover, template).sum())
        if likeness > best.likeness:
            best = best._replace(shape=shape, likeness=likeness, radius=radius)
    return best if best.likeness >= _LEAST_LIKENESS and area <= _MOST_AREA else best._replace(shape=None)


def find(pixels: NDArray[np.float32]) -> list[Found]:
    """Every group of pixels that is not background, the largest first."""
    background = background_of(pixels)
    difference = np.linalg.norm(pixels - background, axis=-1)
    masks = sorted(groups(difference > _UNLIKE), key=lambda mask: -int(mask.sum()))
    found = []
    for mask in masks:
        inside = difference >= np.quantile(difference[mask], 0.4)
        colour = np.median(pixels[mask & inside], axis=0)
        strength = max(float(np.linalg.norm(colour - background)), _UNLIKE)
        # The edge's pixels, which are part shape and part background, count in part; so do those just outside.
        near = mask.copy()
        for axis, step in itertools.product((0, 1), (-1, 1)):
            near |= np.roll(mask, step, axis)
        found.append(_best_shape(np.where(near, np.clip(difference / strength, 0, 1), 0))._replace(colour=colour))
    return found


def _position(found: Found) -> str:
    across, down = found.x - SIZE / 2, found.y - SIZE / 2
    if max(abs(across), abs(down)) < _OFF_CENTRE:
        return "centre"
    if abs(across) > abs(down):
        return "left" if across < 0 else "right"
    return "top" if down < 0 else "bottom"


def read(image: Image.Image) -> dict[str, str | None]:
    """What the picture shows, by the names of ATTRIBUTES; None where nothing of the world is seen.

    Several groups are read as the shape and the colour of most of them, or of the largest.
    """
    pixels = pixels_of(image)
    found = find(pixels)
    seen: dict[str, str | None] = dict.fromkeys(ATTRIBUTES)
    seen["background"] = nearest(background_of(pixels), BACKGROUNDS)
    if not found or len(found) > 3:
        return seen
    shapes = [one.shape for one in found]
    colours = [nearest(one.colour, COLOURS) for one in found]
    seen["shape"] = max(shapes, key=shapes.count)
    seen["colour"] = max(colours, key=colours.count)
    seen["count"] = ("one", "two", "three")[len(found) - 1]
    seen["size"] = "large" if found[0].radius > _LARGE else "small"
    seen["position"] = _position(found[0]) if len(found) == 1 else None
    return seen


def right(image: Image.Image, told: Scene) -> dict[str, bool]:
    """For each attribute that a caption states, whether the picture shows it."""
    seen = read(image)
    return {name: seen[name] == value for name, value in vars(told).items() if value is not None}
