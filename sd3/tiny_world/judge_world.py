"""A wider world for the models that judge pictures: figures with patterns and faces, and captions that tell them.

It holds no star in yellow and purple: DreamBooth's subject is as new to the judges as a dog of somebody's is to the
published CLIP and DINO, which have seen fur and spots all the same.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Collection, Sequence
from dataclasses import astuple, dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from sd3.tiny_world import grammar
from sd3.tiny_world.classifier import nearest
from sd3.tiny_world.grammar import BACKGROUNDS, COLOURS, COUNTS, PLURALS, POSITIONS, SHAPES, SIZES, Scene
from sd3.tiny_world.render import (
    INNER,
    OFFSETS,
    SIZE,
    Pixels,
    Plane,
    any_colour,
    coordinates,
    cover,
    distance,
    jittered,
    loose_places,
    paint,
    plain,
    star,
)

Colour = tuple[int, int, int]

FILLS = ("plain", "striped", "dotted", "ringed")
_FACE_WORDS = {"one": ("with a face",), "two": ("with faces",), "three": ("with faces",)}
_PALETTE = tuple(COLOURS.values())
_NEVER = {"yellow", "purple"}  # on a star
_RADII = {"small": (7.5, 11.8), "large": (14.5, 24.0)}  # pixels
_RADIUS_OF_SEVERAL = (7.5, 10.5)
# How often a caption names each thing that it may leave open.
_NAMED = {"look": 0.85, "face": 0.6, "size": 0.4, "position": 0.6, "background": 0.6}


@dataclass(frozen=True)
class Figure:
    """One look, whatever its place. Lengths are shares of its radius."""

    shape: str
    fill: str
    colours: tuple[Colour, Colour]  # the second is of the pattern
    period: float
    slant: float  # of the stripes, radians
    plump: float  # a star's inner corners, as a share of its outer radius
    face: Colour | None
    head: float  # radius of the face


@dataclass(frozen=True)
class Facts:
    """What a picture shows, or what a caption says of it: then "" is what it leaves open.

    `second` is the pattern's colour and `none` without a pattern; several figures have the position `none`.
    """

    shape: str
    count: str
    fill: str
    colour: str
    second: str
    face: str  # yes or no
    size: str
    position: str
    background: str


VALUES = {
    "shape": SHAPES, "count": COUNTS, "fill": FILLS, "colour": tuple(COLOURS), "second": (*COLOURS, "none"),
    "face": ("yes", "no"), "size": SIZES, "position": (*POSITIONS, "none"), "background": tuple(BACKGROUNDS),
}  # fmt: skip
LOOK = ("shape", "fill", "colour", "second", "face")
assert list(VALUES) == [field.name for field in fields(Facts)]


def labels(facts: Facts) -> list[int]:
    """The facts as numbers, in the order of VALUES; one past the last stands for what is left open."""
    return [
        values.index(value) if value else len(values)
        for value, values in zip(astuple(facts), VALUES.values(), strict=True)
    ]


def is_left_out(facts: Facts) -> bool:
    """Whether it is too much like DreamBooth's subject to be drawn for training."""
    return facts.shape == "star" and {facts.colour, facts.second} == _NEVER


def _pattern(figure: Figure, x: Plane, y: Plane, radius: float) -> Plane:
    """How much of each pixel has the second colour."""
    turn = 2 * math.pi / (figure.period * radius)
    cos, sin = math.cos(figure.slant), math.sin(figure.slant)
    if figure.fill == "striped":
        wave = np.sin((x * cos + y * sin) * turn)
    elif figure.fill == "ringed":
        wave = np.sin(np.hypot(x, y) * turn)
    else:
        wave = 0.3 - np.cos((x * cos + y * sin) * turn / 1.3) * np.cos((y * cos - x * sin) * turn / 1.3)
    return cover(wave / turn)


def _draw_face(picture: Pixels, figure: Figure, x: Plane, y: Plane, radius: float) -> Pixels:
    head = figure.head * radius
    ink = (20, 20, 25)
    picture = paint(picture, cover(np.hypot(x, y) - head), figure.face)
    eyes = np.hypot(np.abs(x) - 0.4 * head, y + 0.25 * head) - 0.2 * head
    mouth = np.maximum(np.abs(np.hypot(x, y) - 0.55 * head) - 0.11 * head, 0.2 * head - y)
    return paint(picture, cover(np.minimum(eyes, mouth)), ink)


def draw_figure(picture: Pixels, figure: Figure, x: float, y: float, radius: float, angle: float) -> Pixels:
    """The picture [64, 64, 3] with a figure over it."""
    right, down = coordinates(x, y, angle)
    if figure.shape == "star":
        signed = star(right, down, radius, figure.plump)
    else:
        signed = distance(figure.shape, right, down, radius)
    fill: Colour | Pixels = figure.colours[0]
    if figure.fill != "plain":
        base = np.broadcast_to(np.asarray(fill, np.float32), picture.shape)
        fill = paint(base, _pattern(figure, right, down, radius), figure.colours[1])
    picture = paint(picture, cover(signed), fill)
    return picture if figure.face is None else _draw_face(picture, figure, right, down, radius)


def dress(shape: str, fill: str, colours: tuple[Colour, Colour], face: bool, rng: random.Random) -> Figure:
    """A figure with what is not given drawn at random."""
    light = rng.randint(200, 255)
    skin = (light, light - rng.randint(0, 20), light - rng.randint(10, 60)) if face else None
    plump = INNER if rng.random() < 0.4 else rng.uniform(INNER, 0.62)
    return Figure(
        shape, fill, colours, rng.uniform(0.38, 0.7), rng.choice((0.0, math.pi / 2, rng.uniform(0, math.pi))), plump,
        skin, rng.uniform(0.36, 0.52),
    )  # fmt: skip


def _centre(facts: Facts, radius: float, rng: random.Random) -> tuple[float, float]:
    across, down = OFFSETS[facts.position]
    far = min(rng.uniform(9.5, 16), max(9.5, 33 - radius))
    middle = SIZE / 2
    return middle + across * far + rng.uniform(-3.5, 3.5), middle + down * far + rng.uniform(-3.5, 3.5)


def draw_facts(rng: random.Random) -> Facts:
    """What a picture for training shows; half of them are as plain as the painter's world."""
    while True:
        count = rng.choices(COUNTS, (7, 2, 2))[0]
        wide = rng.random() < 0.5
        fill = rng.choice(FILLS) if wide else "plain"
        colour, second = rng.sample(list(COLOURS), 2)
        facts = _settled(
            Facts(
                rng.choice(SHAPES), count, fill, colour, second, "yes" if wide and rng.random() < 0.6 else "no",
                rng.choice(SIZES), rng.choice(POSITIONS), rng.choice(list(BACKGROUNDS)),
            )
        )  # fmt: skip
        if not is_left_out(facts):
            return facts


def _settled(facts: Facts) -> Facts:
    """The facts without contradictions."""
    if facts.fill == "plain":
        facts = replace(facts, second="none")
    elif facts.fill == "striped":  # nothing tells which stripes are the first
        facts = replace(facts, colour=min(facts.colour, facts.second), second=max(facts.colour, facts.second))
    return facts if facts.count == "one" else replace(facts, size="small", position="none")


def changed(facts: Facts, rng: random.Random) -> Facts:
    """Facts that differ in one thing, and in what hangs on it."""
    while True:
        name = rng.choice(list(VALUES))
        new = replace(facts, **{name: rng.choice(VALUES[name])})
        if new.fill != "plain" and new.second in ("none", new.colour):
            new = replace(new, second=rng.choice([one for one in COLOURS if one != new.colour]))
        if new.count == "one" and new.position == "none":
            new = replace(new, position=rng.choice(POSITIONS))
        new = _settled(new)
        if new != facts and not is_left_out(new):
            return new


def picture_of(facts: Facts, rng: random.Random) -> Pixels:
    """A picture [64, 64, 3] that shows the facts; all else varies."""
    second = COLOURS.get(facts.second, COLOURS[facts.colour])
    colours = tuple(jittered(colour, rng) for colour in (COLOURS[facts.colour], second))
    figure = dress(facts.shape, facts.fill, colours, facts.face == "yes", rng)
    # Several have to find room.
    radius = rng.uniform(*_RADII[facts.size] if facts.count == "one" else _RADIUS_OF_SEVERAL)
    picture = plain(jittered(BACKGROUNDS[facts.background], rng))
    if facts.count == "one":
        spots = [_centre(facts, radius, rng)]
    else:
        spots = loose_places(Scene(facts.shape, facts.count), radius, rng)
    for x, y in spots:
        picture = draw_figure(picture, figure, x, y, radius, rng.uniform(-0.3, 0.3))
    return picture


def draw_named(rng: random.Random) -> set[str]:
    """What a caption tells beside shape and count; the look is fill and colours."""
    return {name for name, share in _NAMED.items() if rng.random() < share}


def told(facts: Facts, named: Collection[str], rng: random.Random) -> Facts:
    """The facts as a caption tells them. It never says that there is no face."""
    open_ = {name: "" for name in ("size", "position", "background") if name not in named}
    if "look" not in named:
        open_ |= {"fill": "", "colour": "", "second": ""}
    elif facts.fill != "plain" and rng.random() < 0.2:
        open_ |= {"colour": "", "second": ""}
    if "face" not in named or facts.face == "no":
        open_["face"] = ""
    if facts.position == "none":
        open_["position"] = ""
    return replace(facts, **open_)


def caption_of(facts: Facts, rng: random.Random) -> str:
    """One of the ways to say what the facts tell, such as `a striped blue and red star with a face, on black`."""
    look = facts.colour
    if facts.fill and facts.fill != "plain":
        look = f"{facts.fill} {facts.colour} and {facts.second}" if facts.colour else facts.fill
    scene = Scene(
        facts.shape, facts.count, look or None, facts.size or None, facts.position or None, facts.background or None
    )
    caption = grammar.caption_of(scene, rng)
    if facts.face != "yes":
        return caption
    noun = facts.shape if facts.count == "one" else PLURALS[facts.shape]
    # A whole word: `ringed` is no ring.
    return re.sub(rf"\b{noun}\b", f"{noun} {rng.choice(_FACE_WORDS[facts.count])}", caption, count=1)


def _apart(one: Colour, other: Colour) -> bool:
    return math.dist(one, other) > 90


def _is_new(figure: Figure) -> bool:
    """Whether it may be drawn for training, and its colours can be told apart."""
    if figure.fill == "plain":
        return True
    names = {nearest(np.asarray(colour, np.float32), COLOURS) for colour in figure.colours}
    return _apart(*figure.colours) and not (figure.shape == "star" and names == _NEVER)


def draw_look(rng: random.Random) -> Figure:
    """A figure of any look."""
    while True:
        colours = (any_colour(rng, _PALETTE), any_colour(rng, _PALETTE))
        figure = dress(rng.choice(SHAPES), rng.choice(FILLS), colours, rng.random() < 0.5, rng)
        if _is_new(figure):
            return figure


def look_labels(figure: Figure) -> list[int]:
    """What a figure looks like as numbers, in the order of LOOK; a colour counts as the world's nearest."""
    first, second = (nearest(np.asarray(colour, np.float32), COLOURS) for colour in figure.colours)
    if figure.fill == "plain":
        second = "none"
    look = (figure.shape, figure.fill, first, second, "yes" if figure.face else "no")
    return [VALUES[name].index(value) for name, value in zip(LOOK, look, strict=True)]


def altered(figure: Figure, rng: random.Random) -> Figure:
    """The figure with one other shape, pattern or colour, or with a face put on or off."""
    while True:
        other = draw_look(rng)
        change = rng.choice(("shape", "fill", "first", "second", "face"))
        if change == "first":
            new = replace(figure, colours=(other.colours[0], figure.colours[1]))
            seen = _apart(figure.colours[0], new.colours[0])
        elif change == "second":
            new = replace(figure, colours=(figure.colours[0], other.colours[1]))
            seen = figure.fill != "plain" and _apart(figure.colours[1], new.colours[1])
        else:
            new = replace(figure, **{change: getattr(other, change)})
            seen = (figure.face is None) != (new.face is None) if change == "face" else new != figure
        if seen and _is_new(new):
            return new


def view_of(figure: Figure, rng: random.Random) -> Pixels:
    """A picture [64, 64, 3] of the figure somewhere on some background."""
    while True:
        ground = rng.choice(list(BACKGROUNDS.values())) if rng.random() < 0.6 else any_colour(rng, _PALETTE)
        if _apart(ground, figure.colours[0]):
            break
    lit = replace(figure, colours=tuple(jittered(colour, rng) for colour in figure.colours))
    radius = rng.uniform(10, 24)
    room = SIZE / 2 - 0.9 * radius
    x, y = (SIZE / 2 + rng.uniform(-room, room) for _ in range(2))
    return draw_figure(plain(jittered(ground, rng)), lit, x, y, radius, rng.uniform(-0.6, 0.6))


def words() -> list[str]:
    """Every word and mark of the captions, sorted."""
    faces = {word for phrases in _FACE_WORDS.values() for phrase in phrases for word in phrase.split()}
    return sorted({*grammar.words(), *FILLS[1:], "and", *faces})


def fits(captions: Sequence[Facts], pictures: Sequence[Facts]) -> NDArray[np.bool_]:
    """Whether each caption is true of each picture [captions, pictures]."""
    said = np.array([astuple(facts) for facts in captions])[:, None]
    shown = np.array([astuple(facts) for facts in pictures])[None]
    return ((said == "") | (said == shown)).all(-1)
