"""The picture that image-to-image starts from: a file or an address."""

from __future__ import annotations

import hashlib
import http.client
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

from sd3.common.command_line import UserError
from sd3.data.decoding import ImageError, decode

if TYPE_CHECKING:
    from PIL import Image

MOST_BYTES = 100_000_000
TIMEOUT_SECONDS = 60


def read_image(place: str) -> tuple[Image.Image, str]:
    """The picture at a path or an http(s) address, upright and in RGB, and the SHA-256 of its bytes.

    Raises:
        UserError: it cannot be had, or is no picture.
    """
    content = _download(place) if place.startswith(("http://", "https://")) else _read(place)
    try:
        return decode(content), hashlib.sha256(content).hexdigest()
    except ImageError as error:
        raise UserError(f"--image={place} cannot be read as an image ({error}); give a PNG or JPEG.") from None


def fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """The middle of the picture at the size to paint, without stretching it."""
    from PIL import Image, ImageOps

    return ImageOps.fit(image, (width, height), method=Image.Resampling.LANCZOS)


def _read(place: str) -> bytes:
    try:
        return Path(place).read_bytes()
    except OSError as error:
        raise UserError(f"--image={place} cannot be read ({error.strerror}); give the path of a picture.") from None


def _download(place: str) -> bytes:
    try:
        with urllib.request.urlopen(place, timeout=TIMEOUT_SECONDS) as answer:
            content = answer.read(MOST_BYTES + 1)
    except (OSError, ValueError, http.client.HTTPException) as error:
        why = error.reason if isinstance(error, urllib.error.URLError) else error
        raise UserError(f"--image={place} cannot be fetched ({why}); download it and give its path.") from None
    if len(content) > MOST_BYTES:
        raise UserError(f"--image={place} is larger than {MOST_BYTES // 1_000_000} MB; give a smaller picture.")
    return content
