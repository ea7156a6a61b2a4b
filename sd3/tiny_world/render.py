"""Scenes as pictures: shapes by their signed distance, so that edges are smooth at any size. Needs numpy alone."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sd3.tiny_world.grammar import BACKGROUNDS, COLOURS, SHAPES, Scene

if TYPE_CHECKING:
    from PIL import Image

Pixels = NDArray[np.float32]  # [height, width, 3], 0 to 255
Plane = NDArray[np.float32]  # [height, width]

SIZE = 64  # pixels; all lengths below are for this size
# Of one shape, and of each of several.
RADII = {("one", "small"): (10.5, 11.5), ("one", "large"): (17.0, 18.5)}
_RADIUS_OF_SEVERAL = (9.5, 10.5)
_FROM_MIDDLE = {"small": 15.0, "large": 11.0, "two": 14.0, "three": 15.0}
_LOOSE_RADII = {"small": (7.5, 9.5), "large": (14.5, 17.0)}
OFFSETS = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1), "centre": (0, 0)}
INNER = 0.42  # a star's inner corners, as a share of its outer radius


def star(x: Plane, y: Plane, radius: float, inner: float = INNER) -> Plane:
    """Signed distance to the edge lines of a five-pointed star, folded into one half of one point; `inner` is the share
    of the outer radius at which its inner corners are."""
    outer, turn = 1.1 * radius, math.pi / 5
    angle = np.abs((np.arctan2(x, -y) + turn) % (2 * turn) - turn)
    distance = np.hypot(x, y)
    across, along = distance * np.sin(angle), distance * np.cos(angle)
    corner_across, corner_along = outer * inner * math.sin(turn), outer * inner * math.cos(turn)
    edge = math.hypot(corner_across, corner_along - outer)
    return (across * (outer - corner_along) - (outer - along) * corner_across) / edge


def _triangle(x: Plane, y: Plane, radius: float) -> Plane:
    sides = [x * math.cos(a) + y * math.sin(a) for a in (math.pi / 2, math.pi * 7 / 6, math.pi * 11 / 6)]
    return np.maximum.reduce(sides) - 0.55 * radius


def _bar(x: Plane, y: Plane, half_width: float, half_height: float) -> Plane:
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def distance(shape: str, x: Plane, y: Plane, radius: float) -> Plane:
    """Signed distance in pixels (below 0 inside) of points (x right, y down) from the edge of a shape at the origin."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return _bar(x, y, 0.85 * radius, 0.85 * radius)
    if shape == "triangle":
        return _triangle(x, y, radius)
    if shape == "cross":
        return np.minimum(_bar(x, y, radius, 0.32 * radius), _bar(x, y, 0.32 * radius, radius))
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.72 * radius) - 0.28 * radius
    return star(x, y, radius)


def coordinates(x: float, y: float, angle: float, size: int = SIZE) -> tuple[Plane, Plane]:
    """Every pixel's place seen from a shape at (x, y) turned by `angle` radians."""
    rows, columns = np.mgrid[0:size, 0:size].astype(np.float32) + 0.5
    right, down = columns - x, rows - y
    cos, sin = math.cos(angle), math.sin(angle)
    return right * cos + down * sin, down * cos - right * sin


def cover(signed: Plane) -> Plane:
    """How much of each pixel lies inside an edge, 0 to 1, from the signed distances to it."""
    return np.clip(0.5 - signed, 0, 1)


def coverage(shape: str, x: float, y: float, radius: float, angle: float, size: int = SIZE) -> Plane:
    """How much of each pixel a shape covers, 0 to 1."""
    return cover(distance(shape, *coordinates(x, y, angle, size), radius))


def paint(picture: Pixels, cover: Plane, colour: tuple[int, int, int] | Pixels) -> Pixels:
    """The picture with `colour`, one or one a pixel, laid over it."""
    return picture + cover[..., None] * (np.asarray(colour, np.float32) - picture)


def plain(colour: tuple[int, int, int], size: int = SIZE) -> Pixels:
    """A picture [size, size, 3] of one colour."""
    return np.broadcast_to(np.asarray(colour, np.float32), (size, size, 3)).astype(np.float32)


def any_colour(
    rng: random.Random, known: Sequence[tuple[int, int, int]] = (*COLOURS.values(), *BACKGROUNDS.values()),
    share: float = 0.5,
) -> tuple[int, int, int]:  # fmt: skip
    """In this share of cases one of the known colours, else any."""
    if rng.random() < share:
        return rng.choice(known)
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)


def jittered(colour: tuple[int, int, int], rng: random.Random, most: int = 8) -> tuple[int, int, int]:
    """The colour or one much like it: each part differs by `most` of 255 at most."""
    red, green, blue = (min(255, max(0, value + rng.randint(-most, most))) for value in colour)
    return red, green, blue


def places_of(scene: Scene, rng: random.Random) -> list[tuple[float, float]]:
    """Centres of the shapes: one at its position, several around the middle."""

    def near(across: float, down: float) -> tuple[float, float]:
        return SIZE / 2 + across + rng.uniform(-1, 1), SIZE / 2 + down + rng.uniform(-1, 1)

    if scene.count == "one":
        across, down = OFFSETS[scene.position or "centre"]
        far = _FROM_MIDDLE[scene.size or ""]
        return [near(across * far, down * far)]
    number, far = {"two": 2, "three": 3}[scene.count], _FROM_MIDDLE[scene.count]
    first = rng.choice((0.0, 0.25, 0.5, 0.75)) * (math.pi if number == 2 else 2 * math.pi)
    angles = [first + 2 * math.pi * i / number for i in range(number)]
    return [near(far * math.cos(angle), far * math.sin(angle)) for angle in angles]


def loose_places(scene: Scene, radius: float, rng: random.Random) -> list[tuple[float, float]]:
    """Centres of the shapes: one near its position, several anywhere clear of each other and of the edge."""
    middle = SIZE / 2
    if scene.count == "one":
        across, down = OFFSETS[scene.position or "centre"]
        far = (14.5 if scene.size == "small" else 12.0) + rng.uniform(-1, 2)
        return [(middle + across * far + rng.uniform(-2, 2), middle + down * far + rng.uniform(-2, 2))]
    number = {"two": 2, "three": 3}[scene.count]
    margin = 1.1 * radius + 2
    while True:
        places = [(rng.uniform(margin, SIZE - margin), rng.uniform(margin, SIZE - margin)) for _ in range(number)]
        gaps = [math.dist(a, b) for i, a in enumerate(places) for b in places[:i]]
        if min(gaps) > 2.2 * radius + 4:
            return places


def render(scene: Scene, rng: random.Random, loose: bool = False) -> Pixels:
    """A picture [64, 64, 3] of a scene with nothing left open; place, size, turn and colours vary a little, and more
    where it is `loose`: then shapes are smaller too, as hard as the autoencoder shall find them."""
    jitter, turn = (8, 0.12) if loose else (3, 0.04)
    picture = plain(jittered(BACKGROUNDS[scene.background or ""], rng, jitter))
    colour = jittered(COLOURS[scene.colour or ""], rng, jitter)
    if loose:
        radius = rng.uniform(*_LOOSE_RADII[scene.size or ""])
        places = loose_places(scene, radius, rng)
    else:
        radius = rng.uniform(*RADII.get((scene.count, scene.size), _RADIUS_OF_SEVERAL))
        places = places_of(scene, rng)
    for x, y in places:
        picture = paint(picture, coverage(scene.shape, x, y, radius, rng.uniform(-turn, turn)), colour)
    return picture


def doodle(rng: random.Random) -> Pixels:
    """A picture outside the world for the autoencoder, which must code more than painters learn: shapes in any colour,
    plain or striped, and dots. Stars are plain, so that a striped one stays new."""

    picture = plain(any_colour(rng, share=0.3))
    for _ in range(rng.randint(1, 3)):
        shape, angle = rng.choice(SHAPES), rng.uniform(0, 2 * math.pi)
        x, y, radius = rng.uniform(8, 56), rng.uniform(8, 56), rng.uniform(6, 24)
        along, across = coordinates(x, y, angle)
        fill: tuple[int, int, int] | Pixels = any_colour(rng, share=0.3)
        if shape != "star" and rng.random() < 0.6:
            period, turn = rng.uniform(6, 12), rng.uniform(0, 2 * math.pi)
            wave = np.sin((along * math.cos(turn) + across * math.sin(turn)) * 2 * math.pi / period)
            base = np.broadcast_to(np.asarray(fill, np.float32), picture.shape)
            fill = paint(base, np.clip(0.5 + wave * period / 6, 0, 1), any_colour(rng, share=0.3))
        picture = paint(picture, cover(distance(shape, along, across, radius)), fill)
    for _ in range(rng.randint(0, 6)):
        dot = coverage(rng.choice(("circle", "cross", "ring")), rng.uniform(4, 60), rng.uniform(4, 60),
                       rng.uniform(1.5, 5), rng.uniform(0, 6))  # fmt: skip
        picture = paint(picture, dot, any_colour(rng, share=0.3))
    return picture


def to_image(picture: Pixels) -> Image.Image:
    """The picture as 8-bit RGB."""
    from PIL import Image

    return Image.fromarray(np.clip(np.rint(picture), 0, 255).astype(np.uint8))
