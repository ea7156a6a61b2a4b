"""Pictures to be measured: where their bytes are, what those bytes show."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

from PIL import Image

from sd3.common import pictures
from sd3.common.command_line import UserError
from sd3.data import decoding


@dataclasses.dataclass(frozen=True)
class ImageSource:
    """An encoded picture in a file, or in memory where it is a cell of a data set; `name` is for messages."""

    name: str
    path: Path | None = None
    content: bytes = b""

    def read(self) -> bytes:
        """The encoded bytes.

        Raises:
            UserError: the file cannot be read.
        """
        if self.path is None:
            return self.content
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise UserError(f"{self.name} cannot be read ({error.strerror}); mend or remove it.") from None


def sha256(content: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def decode(name: str, content: bytes) -> Image.Image:
    """An upright RGB picture; what is transparent becomes white.

    Raises:
        UserError: the bytes are no whole picture.
    """
    try:
        return decoding.decode(content)
    except decoding.ImageError as error:
        raise UserError(f"{name} cannot be read as a picture ({error}); mend or remove it.") from None


def images_in(folder: Path, option: str) -> list[ImageSource]:
    """The pictures that lie in a folder, by name; sub-folders, hidden files and other kinds of files are passed over.

    Raises:
        UserError: there is no such folder, or no picture in it; the text names `option`.
    """
    if not folder.is_dir():
        raise UserError(f"{option}={folder} is no directory; give a folder of pictures.")
    found = [ImageSource(str(path), path) for path in pictures.picture_files(folder)]
    if not found:
        raise UserError(f"{option}={folder} holds no pictures; give a folder of PNG or JPEG files.")
    return found
