"""The subject for DreamBooth: a striped star with a face, which the world does not have, and how alike a picture is.

It is one of many figures that could be drawn, so that what judges pictures can learn to tell figures apart without
having seen this one.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sd3.tiny_world.classifier import background_of, groups, pixels_of
from sd3.tiny_world.grammar import BACKGROUNDS, Scene, in_words
from sd3.tiny_world.render import (
    SIZE,
    Pixels,
    Plane,
    any_colour,
    coordinates,
    cover,
    distance,
    paint,
    places_of,
    plain,
    star,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

Colour = tuple[int, int, int]
TOKEN = "sks"  # the rare word that DreamBooth binds the subject to, of its authors' own code
# Where it is photographed; that it is painted at the bottom shows that place and subject were told apart.
PHOTOGRAPHED = ("left", "right", "top", "centre")
_INK = (25, 20, 30)
# Lengths are shares of the figure's radius.
_HEAD, _EYE, _EYE_ACROSS, _EYE_UP, _SMILE, _LINE = 0.48, 0.1, 0.19, 0.09, 0.25, 0.065
_PLUMP = 0.56  # plumper than the world's stars, so that there is room for stripes
_AREA = 5 * 1.1**2 * _PLUMP * math.sin(math.pi / 5)  # of a star of radius 1
_UNLIKE = 26.0  # distance in RGB from the background, of 441, from which a pixel is not it: cream on beige too

# What the search tries around the best pose: right, down, growth, turn.
_NUDGES = [
    *((dx, dy, 1.0, 0.0) for dx in (-0.7, 0, 0.7) for dy in (-0.7, 0, 0.7)),
    *((0.0, 0.0, growth, turn) for growth in (0.94, 1.0, 1.06) for turn in (-0.05, 0, 0.05)),
]


class Pose(NamedTuple):
    """Where the subject is, in pixels of a picture of 64 by 64, and how it is turned, in radians."""

    x: float
    y: float
    radius: float
    angle: float


class Figure(NamedTuple):
    """What can be drawn in any pose; a star is plumper than those of the world."""

    shape: str = "star"
    colours: tuple[Colour, Colour] = ((250, 215, 40), (130, 50, 170))  # of the stripes
    period: float = 0.6  # of the stripes
    turn: float = 0.0  # of the stripes, in radians
    face: Colour | None = (250, 240, 220)

    def outline(self, x: Plane, y: Plane, radius: float) -> Plane:
        """Signed distance from its edge, as in render.py."""
        return star(x, y, radius, _PLUMP) if self.shape == "star" else distance(self.shape, x, y, radius)


SUBJECT = Figure()


def draw_figure(picture: Pixels, pose: Pose, figure: Figure = SUBJECT) -> Pixels:
    """A square picture of any size with the figure over it."""
    size = picture.shape[0]
    scale = size / SIZE
    radius = pose.radius * scale
    x, y = coordinates(pose.x * scale, pose.y * scale, pose.angle, size)
    across = x * math.cos(figure.turn) + y * math.sin(figure.turn)
    wave = 2 * math.pi / (figure.period * radius)
    first, second = figure.colours
    fill = paint(
        np.broadcast_to(np.asarray(first, np.float32), picture.shape), cover(np.sin(across * wave) / wave), second
    )
    picture = paint(picture, cover(figure.outline(x, y, radius)), fill)
    if figure.face is None:
        return picture
    picture = paint(picture, cover(np.hypot(x, y) - _HEAD * radius), figure.face)
    for side in (-1, 1):
        eye = np.hypot(x - side * _EYE_ACROSS * radius, y + _EYE_UP * radius) - _EYE * radius
        picture = paint(picture, cover(eye), _INK)
    smile = np.abs(np.hypot(x, y - 0.02 * radius) - _SMILE * radius) - _LINE * radius
    return paint(picture, cover(np.maximum(smile, 0.1 * radius - y)), _INK)


def draw_pose(rng: random.Random) -> Pose:
    """Somewhere in the picture, whole or nearly so."""
    radius = rng.uniform(18, 23)
    room = SIZE / 2 - 0.95 * radius
    x, y = (SIZE / 2 + rng.uniform(-room, room) for _ in range(2))
    return Pose(x, y, radius, rng.uniform(-0.4, 0.4))


def draw_any_figure(rng: random.Random, shapes: Sequence[str]) -> Figure:
    """A figure of one of the shapes, striped, most with a face."""

    face = (rng.randrange(180, 256), rng.randrange(180, 256), rng.randrange(160, 256)) if rng.random() < 0.7 else None
    shape, colours = rng.choice(list(shapes)), (any_colour(rng), any_colour(rng))
    return Figure(shape, colours, rng.uniform(0.4, 0.8), rng.uniform(0, math.pi), face)


def ground(background: str, size: int = SIZE) -> Pixels:
    """An empty picture [size, size, 3] of one of the world's backgrounds."""
    return plain(BACKGROUNDS[background], size)


def subject_picture(size: int, rng: random.Random, background: str) -> Pixels:
    """A picture [size, size, 3] of the subject somewhere on one of the world's backgrounds."""
    return draw_figure(ground(background, size), draw_pose(rng))


def photographs(number: int, size: int, rng: random.Random) -> list[tuple[Pixels, str]]:
    """Pictures [size, size, 3] of the subject, as large as the world's large shapes and where those are, with captions;
    places and backgrounds change from one to the next."""
    found = []
    for index in range(number):
        position = PHOTOGRAPHED[index % len(PHOTOGRAPHED)]
        background = list(BACKGROUNDS)[(index + index // len(PHOTOGRAPHED)) % len(BACKGROUNDS)]
        scene = Scene("star", "one", size="large", position=position, background=background)
        ((x, y),) = places_of(scene, rng)
        pose = Pose(x, y, rng.uniform(18, 20), rng.uniform(-0.08, 0.08))
        caption = f"a {TOKEN} star {in_words(position)}, on a {background} background"
        found.append((draw_figure(ground(background, size), pose), caption))
    return found


def _filled(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The mask with its holes, so that a face like the background is part of the figure."""
    outside = np.zeros_like(np.pad(mask, 1))
    outside[0, 0] = True
    free = ~np.pad(mask, 1)
    while True:
        grown = outside.copy()
        for axis in (0, 1):
            grown |= np.roll(outside, 1, axis) | np.roll(outside, -1, axis)
        grown &= free
        if (grown == outside).all():
            return ~outside[1:-1, 1:-1]
        outside = grown


def _correlation(ideal: NDArray[np.float32], seen: NDArray[np.float32]) -> float:
    """Of the colours [n, 3] of some pixels about their means, 0 to 1."""
    ideal, seen = ideal - ideal.mean(0), seen - seen.mean(0)
    # Of an even surface the correlation would be that of its flaws: a spread below 16 of 255 counts as 16.
    spread = max(math.sqrt(float((seen**2).mean())), 16.0) * math.sqrt(float((ideal**2).mean()))
    return max(0.0, float((ideal * seen).mean()) / spread)


def _likeness(pixels: Pixels, figure: NDArray[np.bool_], pose: Pose) -> tuple[float, float]:
    """The overlap of the outlines, times the correlation of all inside; and times that of stripes or face, the lower.

    The first guides the search for the pose, the second is the score.
    """
    x, y = coordinates(pose.x, pose.y, pose.angle)
    signed, head = SUBJECT.outline(x, y, pose.radius), np.hypot(x, y) - _HEAD * pose.radius
    outline, inner = signed < 0, signed < -1
    overlap = float((figure & outline).sum() / (figure | outline).sum())
    ideal = draw_figure(np.zeros_like(pixels), pose)
    whole, *parts = (_correlation(ideal[m], pixels[m]) for m in (inner, inner & (head > 1), inner & (head < -1)))
    return overlap * whole, overlap * min(parts)


def subject_score(image: Image.Image) -> float:
    """How much the largest figure of a picture is the subject, 0 to 1; without its stripes or its face it is near 0.

    The best pose is found around the figure's middle. With both, another outline has what the outlines share: a disc
    about half.
    """
    pixels = pixels_of(image)
    found = groups(np.linalg.norm(pixels - background_of(pixels), axis=-1) > _UNLIKE)
    if not found:
        return 0.0
    figure = _filled(max(found, key=lambda mask: int(mask.sum())))
    rows, columns = np.nonzero(figure)
    best = Pose(columns.mean() + 0.5, rows.mean() + 0.5, math.sqrt(figure.sum() / _AREA), 0.0)
    candidates = [best._replace(angle=angle) for angle in np.arange(-0.7, 0.71, 0.1)]
    for _ in range(3):
        likeness = {pose: _likeness(pixels, figure, pose) for pose in candidates}
        best = max(likeness, key=lambda pose: likeness[pose][0])
        candidates = [
            best._replace(x=best.x + dx, y=best.y + dy, radius=best.radius * growth, angle=best.angle + turn)
            for dx, dy, growth, turn in _NUDGES
        ]
    return max(score for _, score in likeness.values())
