"""Small data sets drawn on the spot, in the two layouts the launchers take.

    python -m sd3.common.synthetic_data --kind dog --output DIR      # a folder of pictures of one subject
    python -m sd3.common.synthetic_data --kind pokemon --output DIR  # captioned creatures in a parquet file
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = {
    "red": (205, 60, 50), "orange": (235, 140, 40), "yellow": (240, 210, 70), "green": (80, 160, 80),
    "blue": (70, 110, 200), "purple": (140, 90, 180), "pink": (240, 150, 180), "brown": (140, 95, 60),
}  # fmt: skip


def scene(size: int, draw_with: random.Random) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """A square picture of sky and ground in random light colours."""
    light = [tuple(draw_with.randint(150, 245) for _ in range(3)) for _ in range(2)]
    image = Image.new("RGB", (size, size), light[0])
    pencil = ImageDraw.Draw(image)
    pencil.rectangle([0, size * draw_with.uniform(0.5, 0.8), size, size], fill=light[1])
    return image, pencil


def head(pencil: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: tuple[int, ...], floppy: bool) -> None:
    """A face of radius r around (x, y) in pixels, with floppy ears or with horns."""
    for side in (-1, 1):
        if floppy:
            left = x + side * r * 0.95 - r * 0.35
            pencil.ellipse([left, y - r * 0.7, left + r * 0.7, y + r * 0.8], fill=tuple(c // 2 for c in colour))
        else:
            tip = (x + side * r * 1.1, y - r * 1.4)
            pencil.polygon([(x + side * r * 0.2, y - r * 0.8), (x + side * r * 0.9, y - r * 0.4), tip], fill=colour)
    pencil.ellipse([x - r, y - r, x + r, y + r], fill=colour)
    for side in (-1, 1):
        eye = x + side * r * 0.4
        pencil.ellipse([eye - r * 0.15, y - r * 0.35, eye + r * 0.15, y - r * 0.05], fill=0)
    pencil.ellipse([x - r * 0.18, y + r * 0.15, x + r * 0.18, y + r * 0.4], fill=(40, 30, 30))


def new_directory(output: Path, fill: Callable[[Path], None]) -> None:
    """Make a directory whole or not at all.

    Raises:
        FileExistsError: `output` exists and is not an empty directory.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"--output {output} exists and is not an empty directory; name a new one.")
    output.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        fill(aside)
        os.chmod(aside, 0o755)
        os.replace(aside, output)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def make_dog(output: Path, images: int = 5, size: int = 96, seed: int = 0) -> None:
    """A folder of `images` pictures, `size` pixels square, of one brown floppy-eared dog in various places."""

    def fill(folder: Path) -> None:
        for index in range(images):
            draw_with = random.Random(f"dog {seed} {index}")
            image, pencil = scene(size, draw_with)
            r = size * draw_with.uniform(0.15, 0.25)
            x, y = (draw_with.uniform(2 * r, size - 2 * r) for _ in range(2))
            pencil.ellipse([x - r * 1.3, y + r * 0.6, x + r * 1.3, y + r * 2.4], fill=COLOURS["brown"])
            head(pencil, x, y, r, COLOURS["brown"], floppy=True)
            image.save(folder / f"dog-{index:02d}.png")

    new_directory(output, fill)


def make_pokemon(output: Path, images: int = 8, size: int = 96, seed: int = 0) -> None:
    """Captioned horned creatures in pokemon-blip-captions' layout: data/*.parquet with columns image and text."""

    def fill(folder: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        rows = []
        for index in range(images):
            draw_with = random.Random(f"creature {seed} {index}")
            image, pencil = scene(size, draw_with)
            name = draw_with.choice(sorted(COLOURS))
            large = draw_with.random() < 0.5
            r = size * (0.3 if large else 0.16)
            head(pencil, size * draw_with.uniform(0.4, 0.6), size * 0.55, r, COLOURS[name], floppy=False)
            stream = io.BytesIO()
            image.save(stream, format="PNG")
            text = f"a {'large' if large else 'small'} {name} creature with two horns"
            rows.append({"image": {"bytes": stream.getvalue(), "path": f"{index:03d}.png"}, "text": text})
        features = {"image": {"_type": "Image"}, "text": {"dtype": "string", "_type": "Value"}}
        schema = pyarrow.schema(
            [
                ("image", pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])),
                ("text", pyarrow.string()),
            ],
            metadata={"huggingface": json.dumps({"info": {"features": features}})},
        )
        (folder / "data").mkdir()
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(rows, schema=schema), folder / "data" / "train-00000-of-00001.parquet"
        )
        (folder / "dataset_infos.json").write_text(json.dumps({"default": {"features": features}}) + "\n")

    new_directory(output, fill)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Draw a small data set.")
    parser.add_argument("--kind", choices=("dog", "pokemon"), required=True)
    parser.add_argument("--output", type=Path, required=True, help="directory to make")
    parser.add_argument("--images", type=int, help="how many (default 5 dogs, 8 creatures)")
    parser.add_argument("--size", type=int, default=96, help="side in pixels (default 96)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    images = options.images if options.images is not None else {"dog": 5, "pokemon": 8}[options.kind]
    try:
        if images < 1 or options.size < 16:
            raise ValueError(f"--images={images} --size={options.size}: expected at least 1 image of 16 pixels.")
        {"dog": make_dog, "pokemon": make_pokemon}[options.kind](options.output, images, options.size, options.seed)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
