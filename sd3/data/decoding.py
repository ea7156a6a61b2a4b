"""Decodes an image file to upright 8-bit RGB, the same for both engines, for checks and for image-to-image.

Nothing is cut off on the way: what is transparent lies on white, 16-bit grey and float values are scaled to 8 bits, and
an image whose values have no such scale is refused.
"""

from __future__ import annotations

import io
import re
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import (  # the plugins: Pillow loads only five of them by itself
    IcoImagePlugin,  # noqa: F401
    Image,
    ImageOps,
    Jpeg2KImagePlugin,  # noqa: F401
    PcxImagePlugin,  # noqa: F401
    PngImagePlugin,
    SgiImagePlugin,  # noqa: F401
    TgaImagePlugin,  # noqa: F401
    TiffImagePlugin,  # noqa: F401
    WebPImagePlugin,  # noqa: F401
)

from sd3.data.image_formats import CONVERT, FORMATS, ImageError, refuse_other_formats, unidentified
from sd3.data.tiff import TiffFacts, tiff_facts

MOST_PIXELS = 100_000_000
TURNED = (5, 6, 7, 8)  # EXIF orientations whose width is the height
REDUCED = 8  # an eighth is the least that JPEG decoders make at once
# Programs keep whole workflows and editing histories in compressed text: 64 MB of it in all is Pillow's own limit.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
# The limit on pixels is the one above; Pillow's own warns long before.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
ALPHA_MODES = ("RGBA", "LA", "PA", "La", "RGBa")
LEVELS = {"L;2": 85, "L;4": 17}  # of 8 bits, for one of PNG's 2 and 4 bits: 255 / 3 and 255 / 15
JPEG2000_SIZE = b"\xff\x4f\xff\x51"  # begins a codestream
JPEG2000_DEPTH = 42  # bytes from there to the depth of the first channel, less 1 (ISO/IEC 15444-1, A.5.1)
DEEP = re.compile("(?<!BGR);16[BLN]?$")  # how Pillow calls channels of 16 bits in a file; 16 bits in all are BGR;16
@dataclass(frozen=True)
class Decoded:
    """An upright RGB image, and what was done to the file's own (`changes`, empty for plain RGB)."""

    image: Image.Image
    changes: tuple[str, ...] = ()
    size: tuple[int, int] | None = None  # of the whole image, where `image` is a reduced one


def decode(content: bytes) -> Image.Image:
    """The image in these bytes, upright and in RGB.

    Raises:
        ImageError: they are not a whole image of a known format, or its values have no scale.
    """
    return decode_with_changes(content).image


def decode_with_changes(content: bytes) -> Decoded:
    """As `decode`, with a list of the conversions that were made."""
    return _read(content, reduced=False)


def inspect(content: bytes) -> tuple[tuple[int, int], tuple[str, ...]]:
    """Width and height of what `decode` returns, and the conversions; raises as that does, after all bytes were read.

    A photograph in JPEG takes a third of the time: its pixels are made at an eighth of the size.
    """
    found = _read(content, reduced=True)
    return found.size or found.image.size, found.changes


def _read(content: bytes, reduced: bool) -> Decoded:
    if not content:
        raise ImageError("the file is empty")
    refuse_other_formats(content)
    try:
        return _decode(content, reduced)
    except ImageError:
        raise
    except Image.UnidentifiedImageError:
        raise ImageError(unidentified(content)) from None
    # Pillow's readers meet damaged files with whatever their arithmetic or tables raise.
    except Exception as error:  # noqa: BLE001
        raise ImageError(_reason(error)) from None


def image_size(content: bytes) -> tuple[int, int]:
    """Width and height of the upright image, from its header; raises as `decode` does."""
    try:
        with _open(content) as image:
            width, height = image.size
            # Of TIFF the size is the upright image's already.
            turned = image.format != "TIFF" and image.getexif().get(0x0112, 1) in TURNED
    except ImageError:
        raise
    except Exception as error:  # noqa: BLE001
        raise ImageError(_reason(error)) from None
    return (height, width) if turned else (width, height)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"it is damaged: {text}" if text else f"it is damaged: {type(error).__name__}"


def _open(content: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError:
        raise ImageError(f"it has more than {MOST_PIXELS // 1_000_000} million pixels") from None
    if image.width * image.height > MOST_PIXELS:
        raise ImageError(f"it has more than {MOST_PIXELS // 1_000_000} million pixels, {image.width}x{image.height}")
    if image.width * image.height == 0:
        raise ImageError("it has no pixels")
    return image


def _decode(content: bytes, reduced: bool) -> Decoded:
    with _open(content) as image:
        # Further images of an MPO are previews and the other eye's view.
        several = getattr(image, "is_animated", False) and image.format != "MPO"
        raw_mode, of_tiff = _raw_mode(image, content), tiff_facts(image)
        size = None
        if reduced and image.format in ("JPEG", "MPO") and min(image.size) >= REDUCED:
            size = image.size
            image.draft(None, (size[0] // REDUCED, size[1] // REDUCED))
        image.load()
        # In place: a photograph of 12 megapixels is copied for nothing otherwise. A TIFF is upright by now.
        orientation = of_tiff.orientation if image.format == "TIFF" else image.getexif().get(0x0112, 1)
        ImageOps.exif_transpose(image, in_place=True)
    changes = ["first of several frames"] if several else []
    if orientation in range(2, 9):
        changes.append("turned upright as its EXIF data say")
    if size and orientation in TURNED:
        size = size[::-1]
    converted, how = _to_rgb(image, raw_mode, of_tiff)
    return Decoded(converted, (*changes, *how), size)


def _raw_mode(image: Image.Image, content: bytes) -> str:
    """Pillow's name of the pixels as they are in the file; with ";16" where a channel has more than 8 bits."""
    arguments = image.tile[0].args if image.tile else ""
    if image.format == "JPEG2000":
        start = content.find(JPEG2000_SIZE)
        return f"{image.mode};16" if start >= 0 and content[start + JPEG2000_DEPTH] & 0x7F > 7 else image.mode
    if isinstance(arguments, str):
        return arguments
    names = [each for each in arguments or () if isinstance(each, str)]
    # Of a PPM the largest value follows; of an SGI image a decoder of its own has 16 bits.
    wide = image.format == "PPM" and any(isinstance(each, int) and each > 255 for each in arguments[1:2])
    wide |= image.format == "SGI" and image.tile[0].codec_name == "SGI16"
    return f"{names[0]};16" if names and wide else next(iter(names), "")


def _to_rgb(image: Image.Image, raw_mode: str, of_tiff: TiffFacts) -> tuple[Image.Image, tuple[str, ...]]:
    """The image in RGB, and how it became so."""
    if image.mode.startswith(("I", "F")):
        image, how = _scaled(image, of_tiff)
        return image, (how,)
    if image.mode in ("P", "PA"):
        _check_palette(image, of_tiff.palette)
    cut = ("16-bit colour to 8 bits",) if DEEP.search(raw_mode) else ()
    key = _colour_key(image, raw_mode)
    if image.mode in ALPHA_MODES or key is not None:
        flat, transparent = _on_white(image, key)
        return flat, (*cut, f"{image.mode} with transparency on white" if transparent else f"{image.mode} to RGB")
    if image.mode == "RGB":
        return image, cut
    try:
        return image.convert("RGB"), (*cut, f"{image.mode} to RGB")
    except ValueError:
        raise ImageError(f"its colours are in {image.mode}; convert it to RGB") from None


def _check_palette(image: Image.Image, palette: bytes | None) -> None:
    """Put the right palette in place; a PNG without any would be all black."""
    if palette is not None:
        image.putpalette(palette)
    elif image.format == "PNG" and image.palette is None:
        raise ImageError("it is damaged: its palette is missing")


def _colour_key(image: Image.Image, raw_mode: str) -> Any:  # noqa: ANN401  # what Pillow keeps in `info`
    """The colour, or the palette's alphas, that a file declares transparent; None for none."""
    key = image.info.get("transparency")
    if key is None:
        return None
    if raw_mode in LEVELS:  # pixels were scaled to 8 bits, the key was not
        return key * LEVELS[raw_mode]
    if not DEEP.search(raw_mode):
        return key
    # The pixels of 16-bit channels were read by their upper 8 bits, the key was not.
    return tuple(value >> 8 for value in key) if isinstance(key, tuple) else key >> 8


def _on_white(image: Image.Image, key: Any) -> tuple[Image.Image, bool]:  # noqa: ANN401
    """The image on white, and whether any of it is transparent."""
    if key is not None:
        image.info["transparency"] = key
    if image.mode == "La":
        image = image.convert("LA")
    image = image.convert("RGBA")
    if image.getextrema()[3][0] == 255:
        return image.convert("RGB"), False
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB"), True


def _scaled(image: Image.Image, of_tiff: TiffFacts) -> tuple[Image.Image, str]:
    """Grey of more than 8 bits, scaled to 8.

    Raises:
        ImageError: the values have no known scale; cut to 8 bits they would be a blank square.
    """
    values = np.asarray(image)
    least, most = values.min(), values.max()
    key = image.info.get("transparency")
    transparent = values == key if isinstance(key, int) else None
    if image.mode == "F":
        if not (np.isfinite(least) and np.isfinite(most) and least >= 0 and most <= 1):
            raise ImageError(f"its float values run from {least:g} to {most:g}, not from 0 to 1; {CONVERT}")
        levels, how = np.rint(values.astype(np.float64) * 255), "float grey scaled to 8 bits"
    elif least < 0 or most > of_tiff.white:
        raise ImageError(
            f"its 32-bit values run from {least} to {most}, more than 16-bit grey holds; {CONVERT}"
        )
    else:
        bits = of_tiff.white.bit_length()
        levels = np.rint(values.astype(np.float64) / (of_tiff.white / 255))
        how = f"{bits}-bit grey scaled to 8 bits"
    if of_tiff.inverted:
        levels = 255 - levels
    grey = levels.astype(np.uint8)
    if transparent is not None:
        grey[transparent] = 255
    return Image.fromarray(grey).convert("RGB"), how
