"""A generated picture: the recipe it was made by, the name that follows from it, and the PNG text chunks that carry it.

Two recipes that differ in anything that can change a pixel have different names, so no picture overwrites another one,
and a file that is there under its name need not be made again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING

from sd3.common.files import new_file

if TYPE_CHECKING:
    from PIL import Image

SLUG_LENGTH = 40
# Recipes of images made before this field was kept had this value, and their digests know nothing of it.
_LENGTH, _USUAL_LENGTH = "max_sequence_length", 256
# Where a part was found changes no pixel; what it holds is in its hash.
_PLACES = ("model", "lora", "image")


class PictureError(ValueError):
    """A picture cannot be read, or carries no recipe; the text is one sentence for the user."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything a picture depends on, and where its parts were found (`model`, `lora`, `image`).

    The hashes are those of sd3.common.model_files and, for the image, SHA-256 of the file. Without a LoRA or an image
    their fields are empty and `lora_scale` and `strength` are 0. T5 reads `max_sequence_length` tokens of a prompt.
    """

    prompt: str
    negative_prompt: str
    seed: int
    steps: int
    guidance_scale: float
    height: int
    width: int
    dtype: str
    model: str
    model_hash: str
    lora: str = ""
    lora_hash: str = ""
    lora_scale: float = 0.0
    image: str = ""
    image_hash: str = ""
    strength: float = 0.0
    vae_tiling: bool = False
    max_sequence_length: int = _USUAL_LENGTH

    def digest(self) -> str:
        """SHA-256, in hexadecimal, of all that can change a pixel."""
        kept = {key: value for key, value in dataclasses.asdict(self).items() if key not in _PLACES}
        if self.max_sequence_length == _USUAL_LENGTH:
            del kept[_LENGTH]
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()

    def file_name(self) -> str:
        """A short slug of the prompt, the seed, and ten digits of the digest."""
        words = re.findall(r"\w+", unicodedata.normalize("NFC", self.prompt.lower()))
        slug = "-".join(words)[:SLUG_LENGTH].strip("-_") or "picture"
        return f"{slug}-{self.seed}-{self.digest()[:10]}.png"


def save_picture(image: Image.Image, path: Path, recipe: Recipe, versions: dict[str, str]) -> None:
    """Write a PNG with the recipe and the versions in text chunks; it appears whole or not at all."""
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    for key, value in dataclasses.asdict(recipe).items():
        chunks.add_itxt(key, value if isinstance(value, str) else json.dumps(value))
    chunks.add_itxt("versions", json.dumps(versions, sort_keys=True))
    with new_file(path) as aside:
        image.save(aside, format="PNG", pnginfo=chunks)


def read_recipe(path: Path) -> Recipe:
    """The recipe in the text chunks of a PNG file; the pixels are not decoded.

    Raises:
        PictureError: it is no readable picture, or it was not made by these scripts.
    """
    from PIL import Image

    try:
        # Text chunks that stand before the pixels are in `info`; asking for `text` would decode the picture.
        with Image.open(path) as image:
            chunks = {_LENGTH: str(_USUAL_LENGTH), **image.info}
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise PictureError(f"{path} cannot be read as a picture ({error}); name a PNG file.") from None
    values: dict[str, object] = {}
    try:
        for field in dataclasses.fields(Recipe):
            text = chunks[field.name]
            values[field.name] = text if field.type == "str" else json.loads(text)
    except (KeyError, ValueError, TypeError):
        raise PictureError(
            f"{path} carries no recipe; name a PNG file made by this project's inference scripts."
        ) from None
    return Recipe(**values)  # type: ignore[arg-type]


def picture_files(folder: Path) -> list[Path]:
    """The files of a folder named as pictures are, in order; a hidden one is what a killed run left half written."""
    from PIL import Image

    known = Image.registered_extensions()
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix.lower() in known and not path.name.startswith(".")
    ]


def pictures_in(folder: Path) -> list[tuple[Path, Recipe]]:
    """The PNG files of a folder that carry a recipe, by name; others, and what a killed run left, are passed over."""
    found = []
    for path in sorted(folder.glob("[!.]*.png")):
        try:
            found.append((path, read_recipe(path)))
        except PictureError:
            continue
    return found
