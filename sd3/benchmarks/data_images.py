"""Image folders for the benchmark of training data: photographs as cameras make them, and many small images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from sd3.common.files import new_directory
from sd3.common.synthetic_data import make_dog

PHOTOGRAPH = (4000, 3000)  # width, height: 12 megapixels
SMALL = 64  # pixels a side
QUALITY = 90  # of the JPEG files, which take 3 to 6 MB with the noise below
GRAIN = 512  # pixels a side of the fine detail, which is repeated: new numbers would take longer than the JPEG


def photograph(seed: int, size: tuple[int, int] = PHOTOGRAPH) -> Image.Image:
    """An RGB image of smooth areas with fine grain on them; the same seed gives the same pixels."""
    numbers = np.random.default_rng(seed)
    width, height = size
    light = 128 + _noise(numbers, (width, height), cover=60, reach=50)
    grain = _noise(numbers, (GRAIN, GRAIN), cover=8, reach=14) + _noise(numbers, (GRAIN, GRAIN), cover=2, reach=11)
    light += np.tile(grain, (-(-height // GRAIN), -(-width // GRAIN)))[:height, :width]
    tint = numbers.uniform(0.7, 1.1, size=3)
    grey = Image.fromarray(np.clip(light, 0, 255).astype(np.uint8))
    return Image.merge("RGB", [grey.point([min(255, int(level * part)) for level in range(256)]) for part in tint])


def _noise(numbers: np.random.Generator, size: tuple[int, int], cover: int, reach: float) -> np.ndarray:
    """Smooth noise [height, width], a new value every `cover` pixels, with the standard deviation `reach` there."""
    width, height = size
    values = numbers.normal(scale=reach, size=(-(-height // cover), -(-width // cover))).astype(np.float32)
    return np.array(Image.fromarray(values).resize(size, Image.Resampling.BICUBIC))


def make_photographs(folder: Path, count: int) -> None:
    """Write `count` JPEG files of 12 megapixels; raises OSError where the folder cannot be made."""
    with new_directory(folder, "--keep") as temporary_path:
        for number in range(count):
            photograph(number).save(temporary_path / f"{number:05d}.jpg", quality=QUALITY)


def folder_of(parent: Path, kind: str, count: int) -> Path:
    """The folder of `count` images in `parent`, made if it is not there; `kind` is photographs or small."""
    folder = parent / f"{kind}-{count}"
    if not folder.exists():
        parent.mkdir(parents=True, exist_ok=True)
        if kind == "photographs":
            make_photographs(folder, count)
        else:
            make_dog(folder, images=count, size=SMALL)
    return folder
