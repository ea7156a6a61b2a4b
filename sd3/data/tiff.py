"""What a TIFF file says of its pixels and Pillow does not act on.

Numbers of tags are those of TIFF 6.0 (Adobe, 1992) and, for camera raw, of the Digital Negative specification.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from sd3.data.image_formats import CONVERT, ImageError

if TYPE_CHECKING:
    from PIL import Image

SUBFILE_TYPE, BITS, PHOTOMETRIC, ORIENTATION, COLOUR_MAP, SAMPLE_FORMAT = 254, 258, 262, 274, 320, 339
DNG_VERSION = 50706
REDUCED_IMAGE = 1  # bit of SUBFILE_TYPE
WHITE_IS_ZERO = 0  # value of PHOTOMETRIC
SIGNED = 2  # value of SAMPLE_FORMAT


class TiffFacts(NamedTuple):
    """`white`: the largest value of integer grey of more than 8 bits; `inverted`: such grey, and float, has white at 0.

    `palette`: red, green and blue of each colour, where the file has them in 8 bits and not, as it should, in 16.
    """

    white: int = 65535
    inverted: bool = False
    palette: bytes | None = None
    orientation: int = 1


def tiff_facts(image: Image.Image) -> TiffFacts:
    """The facts of an image that was opened and not yet loaded; those of any other format are the usual ones.

    Raises:
        ImageError: the first image of the file is not the one that is wanted, or its values cannot be told.
    """
    if image.format != "TIFF":
        return TiffFacts()
    tags = image.tag_v2  # type: ignore[attr-defined]
    if DNG_VERSION in tags:
        raise ImageError(f"it is DNG (camera raw); {CONVERT}")
    if _number(tags.get(SUBFILE_TYPE)) & REDUCED_IMAGE:
        raise ImageError(f"its first image is a preview, as in camera raw files; {CONVERT}")
    bits = _numbers(tags.get(BITS))
    if 8 in bits and SIGNED in _numbers(tags.get(SAMPLE_FORMAT)):
        raise ImageError(f"its values are signed 8-bit numbers; {CONVERT}")
    # Pillow itself turns what has white at 0 over where it has 8 bits at most.
    deep = image.mode.startswith(("I", "F"))
    return TiffFacts(
        white=4095 if bits == (12,) else 65535,
        inverted=deep and tags.get(PHOTOMETRIC) == WHITE_IS_ZERO,
        palette=_palette(_numbers(tags.get(COLOUR_MAP))),
        orientation=_number(tags.get(ORIENTATION, 1)),
    )


def _numbers(value: object) -> tuple[int, ...]:
    values = value if isinstance(value, tuple) else (value,)
    return tuple(each for each in values if isinstance(each, int))


def _number(value: object) -> int:
    return next(iter(_numbers(value)), 0)


def _palette(colour_map: tuple[int, ...]) -> bytes | None:
    """Old programs wrote 8-bit values into the map, in which Pillow reads only the upper byte of 16: all black."""
    if not any(colour_map) or max(colour_map) > 255:
        return None
    third = len(colour_map) // 3
    return bytes(colour_map[place + third * channel] for place in range(third) for channel in range(3))
