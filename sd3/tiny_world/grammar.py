"""The world's scenes and the captions that describe them. Standard library only.

A scene is a background and one, two or three equal shapes on it. A caption names the shape and how many, and any of
colour, size, position and background; what it leaves out is free. Some combinations are never drawn for training: that
a model paints them shows that it composes.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple, dataclass, fields, replace

COLOURS = {
    "red": (214, 40, 40), "orange": (245, 130, 30), "yellow": (250, 215, 40), "green": (40, 160, 70),
    "cyan": (60, 205, 215), "blue": (40, 80, 210), "purple": (130, 50, 170), "pink": (245, 130, 190),
}  # fmt: skip
BACKGROUNDS = {"white": (244, 244, 244), "black": (18, 18, 18), "grey": (128, 128, 128), "beige": (224, 204, 164)}
PLURALS = {
    "circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses", "ring": "rings",
    "star": "stars",
}  # fmt: skip
SHAPES = tuple(PLURALS)
SIZES = ("small", "large")
POSITIONS = ("left", "right", "top", "bottom", "centre")
COUNTS = ("one", "two", "three")

# Of scenes with these pairs, half are held out (Scene.is_held_out) of all that has captions. The text encoders and the
# first cycles of the painter do not see even the other half.
RARE_COLOURS = frozenset(
    {("red", "triangle"), ("blue", "star"), ("green", "ring"), ("yellow", "cross"), ("purple", "circle"),
     ("orange", "square")}
)  # fmt: skip
RARE_POSITIONS = frozenset({("square", "top"), ("star", "left"), ("circle", "bottom"), ("ring", "right")})

_PREFIXES = ("", "", "a picture of ", "a photo of ", "a drawing of ")
_PLACES = {
    "left": ("on the left", "on the left side"), "right": ("on the right", "on the right side"),
    "top": ("at the top", "near the top"), "bottom": ("at the bottom", "near the bottom"),
    "centre": ("in the centre", "in the middle"),
}  # fmt: skip
_GROUNDS = ("on a {} background", "with a {} background", "on {}")
# How often a caption for training names each.
_NAMED = {"colour": 0.85, "size": 0.5, "position": 0.6, "background": 0.6}


@dataclass(frozen=True)
class Scene:
    """What a picture shows, or what a caption says of it: then None is what it leaves open.

    Several shapes are small and have no position.
    """

    shape: str
    count: str = "one"
    colour: str | None = None
    size: str | None = None
    position: str | None = None
    background: str | None = None

    def is_rare(self) -> bool:
        """Whether it has one of the rare pairs."""
        return (self.colour, self.shape) in RARE_COLOURS or (self.shape, self.position) in RARE_POSITIONS

    def is_held_out(self) -> bool:
        """Whether it combines a rare pair with a third attribute as training never shows it: position or, of several,
        count with colour and shape. What leaves one of the three open is not."""
        third = self.position or self.count
        if not self.is_rare() or self.colour is None or third == "one":
            return False
        return (list(COLOURS).index(self.colour) + (*POSITIONS, *COUNTS[1:]).index(third)) % 2 == 0


ATTRIBUTES = {
    "shape": SHAPES, "count": COUNTS, "colour": tuple(COLOURS), "size": SIZES, "position": POSITIONS,
    "background": tuple(BACKGROUNDS),
}  # fmt: skip
assert list(ATTRIBUTES) == [field.name for field in fields(Scene)]


def labels(scene: Scene) -> list[int]:
    """Its attributes as numbers, in the order of ATTRIBUTES; one past the last stands for what is left open."""
    return [
        len(values) if value is None else values.index(value)
        for value, values in zip(astuple(scene), ATTRIBUTES.values(), strict=True)
    ]


def draw_scene(
    rng: random.Random, caption: Scene | None = None, hidden: Callable[[Scene], bool] = Scene.is_rare
) -> Scene:
    """A scene that fits `caption`, where that is given, and of which `hidden` is not true.

    What `caption` states must leave such a scene.
    """
    caption = caption or Scene(rng.choice(SHAPES), rng.choices(COUNTS, (6, 2, 2))[0])
    while True:
        one = caption.count == "one"
        scene = replace(
            caption,
            colour=caption.colour or rng.choice(list(COLOURS)),
            size=caption.size or (rng.choice(SIZES) if one else "small"),
            position=caption.position or (rng.choice(POSITIONS) if one else None),
            background=caption.background or rng.choice(list(BACKGROUNDS)),
        )
        if not hidden(scene):
            return scene


def forget(scene: Scene, rng: random.Random) -> Scene:
    """The scene as a caption tells it, with some attributes left open."""
    return replace(scene, **{name: None for name, share in _NAMED.items() if rng.random() >= share})


def in_words(position: str) -> str:
    """A position as captions say it."""
    return _PLACES[position][0]


def _object(scene: Scene, number: str) -> str:
    words = (number, scene.size, scene.colour, scene.shape if scene.count == "one" else PLURALS[scene.shape])
    return " ".join(word for word in words if word)


def _phrasings(scene: Scene) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Ways to say the object, its place and its background."""
    numbers = ("a", "one") if scene.count == "one" else (scene.count,)
    if scene.count == "one" and (scene.size or scene.colour or scene.shape)[0] in "aeiou":
        numbers = ("an", "one")
    places = _PLACES[scene.position] if scene.position else ("",)
    grounds = tuple(way.format(scene.background) for way in _GROUNDS) if scene.background else ("",)
    return tuple(_object(scene, number) for number in numbers), places, grounds


def _joined(prefix: str, thing: str, place: str, ground: str, ground_first: bool) -> str:
    thing = f"{prefix}{thing} {place}".strip()
    if not ground:
        return thing
    return f"{ground}, {thing}" if ground_first else f"{thing}, {ground}"


def caption_of(scene: Scene, rng: random.Random) -> str:
    """One of the ways to say what `scene` states."""
    things, places, grounds = _phrasings(scene)
    thing = things[0] if rng.random() < 0.9 else rng.choice(things)
    return _joined(rng.choice(_PREFIXES), thing, rng.choice(places), rng.choice(grounds), rng.random() < 0.2)


def all_captions() -> Iterator[str]:
    """Every caption that the grammar can say, held-out ones included; 378 000."""

    def open_or(values: tuple[str, ...]) -> tuple[str | None, ...]:
        return (None, *values)

    colours, grounds = open_or(tuple(COLOURS)), open_or(tuple(BACKGROUNDS))
    for shape, count in itertools.product(SHAPES, COUNTS):
        one = count == "one"
        sizes = open_or(SIZES if one else SIZES[:1])
        for rest in itertools.product(colours, sizes, open_or(POSITIONS if one else ()), grounds):
            ways = _phrasings(Scene(shape, count, *rest))
            orders = (False, True) if rest[-1] else (False,)
            for prefix, first in itertools.product(dict.fromkeys(_PREFIXES), orders):
                for way in itertools.product(*ways):
                    yield _joined(prefix, *way, first)


def words() -> list[str]:
    """Every word and mark of the captions, sorted."""
    pieces = [*ATTRIBUTES["colour"], *SIZES, *BACKGROUNDS, *SHAPES, *PLURALS.values(), *COUNTS, "a", "an", ","]
    phrases = [*_PREFIXES, *itertools.chain(*_PLACES.values()), *_GROUNDS]
    return sorted({*pieces, *(word for phrase in phrases for word in phrase.split() if word != "{}")})


def told_by(caption: str) -> Scene:
    """What a caption states; words that the world does not have are passed over.

    Raises:
        ValueError: it names no shape.
    """
    named = set(re.findall("[a-z]+", caption.lower()))

    def one_of(values: Iterable[str]) -> str | None:
        return next((value for value in values if value in named), None)

    plural = one_of(PLURALS.values())
    shape = one_of(SHAPES) or next((one for one, many in PLURALS.items() if many == plural), None)
    if shape is None:
        raise ValueError(f"'{caption}' names none of the shapes {', '.join(SHAPES)}; name one.")
    position = one_of(POSITIONS) or ("centre" if "middle" in named else None)
    count = one_of(COUNTS[1:]) or COUNTS[0]
    return Scene(shape, count, one_of(COLOURS), one_of(SIZES), position, one_of(BACKGROUNDS))


def _full_name(told: Scene, scene: Scene) -> Scene:
    """What `told` says, with the colour and the place of the scene."""
    return replace(told, colour=scene.colour, position=scene.position)


def held_out_captions(number: int, seed: int = 0) -> list[tuple[str, Scene]]:
    """Captions with what they state, each of a held-out combination; the same for the same seed."""
    rng = random.Random(f"held-out captions {seed}")
    pairs = [*sorted(RARE_COLOURS), *sorted(RARE_POSITIONS)]
    found = []
    for index in range(number):
        left, right = pairs[index % len(pairs)]
        scene = Scene(right)
        while not scene.is_held_out():
            count = rng.choices(COUNTS, (6, 2, 2))[0]
            pair = Scene(right, count, colour=left) if right in SHAPES else Scene(left, position=right)
            scene = draw_scene(rng, pair, hidden=lambda _: False)
        told = _full_name(forget(scene, rng), scene)
        found.append((caption_of(told, rng), told))
    return found


def seen_captions(number: int, seed: int = 0) -> list[tuple[str, Scene]]:
    """Captions with what they state, of scenes as the painter's training shows them; the same for the same seed."""
    rng = random.Random(f"seen captions {seed}")
    scenes = [draw_scene(rng, hidden=Scene.is_held_out) for _ in range(number)]
    told = [_full_name(forget(scene, rng), scene) for scene in scenes]
    return [(caption_of(one, rng), one) for one in told]


def rare_word(rng: random.Random) -> str:
    """A word that the tokenizers spell, such as DreamBooth binds a subject to."""
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(3, 4)))


def with_rare_word(caption: str, word: str) -> str:
    """The caption with a word before its shape, as in `a red sks star`."""
    shapes = {*SHAPES, *PLURALS.values()}
    return " ".join(f"{word} {one}" if one.rstrip(",") in shapes else one for one in caption.split())
