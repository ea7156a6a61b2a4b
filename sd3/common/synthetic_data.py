"""Small data sets drawn locally, in the two shapes of the published ones, for tests and the quick start.

`dog` is a folder of pictures of one dog-like figure; `pokemon` is a folder with a parquet file of pictures and
captions; `subject` is a folder of pictures of the striped star that the tiny SD3 has never seen. Nothing is downloaded.

    python -m sd3.common.synthetic_data --kind dog|pokemon|subject --output DIR [--images N] [--size N] [--seed 0]
"""

from __future__ import annotations

import argparse
import io
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from sd3.common.files import new_directory

if TYPE_CHECKING:
    from PIL import Image

COLOURS = {
    "red": (206, 60, 52), "blue": (56, 96, 200), "green": (62, 156, 84), "yellow": (232, 198, 64),
    "purple": (134, 82, 176), "orange": (232, 132, 48),
}
SHAPES = ("round", "square", "triangular")
SIZES = (16, 4096)


def _canvas(size: int, rng: random.Random) -> Image.Image:
    """A pale background that is not the same twice, so that the figure is what the pictures share."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (size, size), tuple(rng.randint(190, 245) for _ in range(3)))
    ground = tuple(rng.randint(120, 180) for _ in range(3))
    ImageDraw.Draw(image).rectangle((0, round(size * rng.uniform(0.75, 0.85)), size, size), fill=ground)
    return image


def _draw_dog(size: int, rng: random.Random) -> Image.Image:
    """Always the same brown dog with floppy ears, at another place and scale."""
    from PIL import ImageDraw

    image = _canvas(size, rng)
    draw = ImageDraw.Draw(image)
    scale = size * rng.uniform(0.8, 1.0)
    left, top = (size - scale) * rng.random(), (size - scale) * rng.random()

    def box(x0: float, y0: float, x1: float, y1: float) -> tuple[float, ...]:
        return left + x0 * scale, top + y0 * scale, left + x1 * scale, top + y1 * scale

    fur, dark, black = (166, 110, 62), (104, 64, 36), (24, 20, 18)
    draw.line(box(0.72, 0.62, 0.92, 0.42), fill=dark, width=max(2, size // 24))
    for x in (0.30, 0.42, 0.58, 0.68):
        draw.rectangle(box(x, 0.70, x + 0.06, 0.92), fill=dark)
    draw.ellipse(box(0.24, 0.48, 0.80, 0.80), fill=fur)
    draw.ellipse(box(0.12, 0.18, 0.50, 0.56), fill=fur)
    for x in (0.08, 0.44):
        draw.ellipse(box(x, 0.20, x + 0.12, 0.48), fill=dark)
    for x in (0.22, 0.36):
        draw.ellipse(box(x, 0.30, x + 0.05, 0.35), fill=black)
    draw.ellipse(box(0.27, 0.41, 0.36, 0.47), fill=black)
    return image


def _draw_creature(size: int, rng: random.Random, colour: str, shape: str, mood: str) -> Image.Image:
    """The creature that its caption describes."""
    from PIL import ImageDraw

    image = _canvas(size, rng)
    draw = ImageDraw.Draw(image)
    low, high = size * 0.18, size * 0.82
    if shape == "round":
        draw.ellipse((low, low, high, high), fill=COLOURS[colour])
    elif shape == "square":
        draw.rectangle((low, low, high, high), fill=COLOURS[colour])
    else:
        draw.polygon([(size / 2, low), (low, high), (high, high)], fill=COLOURS[colour])
    for x in (0.42, 0.58):
        draw.ellipse((size * (x - 0.04), size * 0.46, size * (x + 0.04), size * 0.54), fill=(20, 20, 20))
    start, end = (20, 160) if mood == "happy" else (200, 340)
    mouth = (size * 0.40, size * 0.58, size * 0.60, size * 0.74)
    draw.arc(mouth, start, end, fill=(20, 20, 20), width=max(1, size // 40))
    return image


def _write_dog(folder: Path, images: int, size: int, rng: random.Random) -> None:
    for index in range(images):
        _draw_dog(size, rng).save(folder / f"{index:02d}.png")


def _write_pokemon(folder: Path, images: int, size: int, rng: random.Random) -> None:
    import datasets
    import pyarrow.parquet

    rows = []
    for index in range(images):
        colour = list(COLOURS)[index % len(COLOURS)]
        shape = SHAPES[index % len(SHAPES)]
        mood = rng.choice(("happy", "sad"))
        png = io.BytesIO()
        _draw_creature(size, rng, colour, shape, mood).save(png, "PNG")
        caption = f"a drawing of a {mood} {shape} {colour} creature"
        rows.append({"image": {"bytes": png.getvalue(), "path": f"{index:02d}.png"}, "text": caption})
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    file = folder / "data" / "train-00000-of-00001.parquet"
    file.parent.mkdir()
    # The schema carries the features, so that datasets decodes the pictures; written by it, a progress bar shows.
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=features.arrow_schema), file)
    about = {
        "default": {
            "description": "Drawn shapes with captions.", "features": features.to_dict(),
            "splits": {"train": {"name": "train", "num_examples": images, "dataset_name": "pokemon"}},
        }
    }
    (folder / "dataset_infos.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def _write_subject(folder: Path, images: int, size: int, rng: random.Random) -> None:
    from sd3.tiny_world.grammar import BACKGROUNDS
    from sd3.tiny_world.render import to_image
    from sd3.tiny_world.subject import subject_picture

    grounds = list(BACKGROUNDS)
    for index in range(images):
        picture = subject_picture(size, rng, grounds[index % len(grounds)])
        to_image(picture).save(folder / f"{index:02d}.png")


def _make(
    write: Callable[[Path, int, int, random.Random], None], output: Path, images: int, size: int, seed: int
) -> None:
    """Check the request, let `write` fill a folder beside `output`, and put it in place in one step."""
    if images < 1:
        raise ValueError(f"--images is {images}, expected at least 1; ask for one picture or more.")
    if not SIZES[0] <= size <= SIZES[1]:
        raise ValueError(f"--size is {size}, expected {SIZES[0]} to {SIZES[1]} pixels; choose one in that range.")
    with new_directory(output, "--output") as aside:
        write(aside, images, size, random.Random(seed))


def make_dog(output: Path, images: int = 5, size: int = 96, seed: int = 0) -> None:
    """Write a folder of PNG pictures of one dog; the same arguments give the same pictures.

    Raises:
        ValueError: a number is out of range.
        OSError: `output` holds something already, or cannot be written.
    """
    _make(_write_dog, output, images, size, seed)


def make_pokemon(output: Path, images: int = 8, size: int = 96, seed: int = 0) -> None:
    """Write a folder with a parquet file of pictures (`image`) and captions (`text`); raises as `make_dog` does."""
    _make(_write_pokemon, output, images, size, seed)


def make_subject(output: Path, images: int = 5, size: int = 64, seed: int = 0) -> None:
    """Write a folder of PNG pictures of one striped star with a face (sd3/tiny_world/subject.py), at varied places and
    on varied backgrounds; raises as `make_dog` does."""
    _make(_write_subject, output, images, size, seed)


MAKERS = {"dog": make_dog, "pokemon": make_pokemon, "subject": make_subject}
DEFAULT_IMAGES = {"dog": 5, "pokemon": 8, "subject": 5}
DEFAULT_SIZES = {"dog": 96, "pokemon": 96, "subject": 64}


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Draw a small data set: dogs, captioned creatures, a striped star.")
    parser.add_argument("--kind", choices=sorted(MAKERS), required=True, help="what to draw")
    parser.add_argument("--output", type=Path, required=True, help="directory to make")
    parser.add_argument("--images", type=int, help="how many pictures (default: 5, or 8 creatures)")
    parser.add_argument("--size", type=int, help="width and height in pixels (default 96, of the star 64)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the drawing (default 0)")
    options = parser.parse_args(arguments)
    images = DEFAULT_IMAGES[options.kind] if options.images is None else options.images
    size = DEFAULT_SIZES[options.kind] if options.size is None else options.size
    try:
        MAKERS[options.kind](options.output, images, size, options.seed)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    from sd3.common import venv

    venv.ensure(["PIL", "datasets"])
    sys.exit(main())
