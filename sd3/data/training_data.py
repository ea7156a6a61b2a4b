"""The training data that the flags name: images with captions, read the same way by checks, engines and evaluation."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sd3.common.command_line import UserError
from sd3.common.memory import uncollected
from sd3.common.pictures import picture_files
from sd3.data.dataset_files import (
    IMAGE_FOLDER,
    check_files,
    files_not_read,
    is_image_type,
    parquet_files,
    why_not_loaded,
)

if TYPE_CHECKING:
    import datasets
    import pyarrow

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
# What desktops write into folders; a leading dot hides the rest of it.
SYSTEM_FILES = ("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r")
MOST_BYTES = 1 << 30  # of an image file: what has more, such as a video, would only fill the memory

Origin = tuple[Path, int | None]  # a file, and the number of the row where it is a table


@dataclass(frozen=True)
class TrainingImage:
    """An encoded image and its caption, None for none of its own.

    `content` reads the bytes and raises UserError where it cannot; `origin` is where they are.
    """

    name: str
    content: Callable[[], bytes]
    caption: str | None
    origin: Origin | None = None


@dataclass(frozen=True)
class TrainingData:
    """Images in the order of the epoch's numbers, and what was found beside them and left out: name and reason."""

    images: list[TrainingImage]
    left_out: list[tuple[str, str]] = field(default_factory=list)


class Spelling(NamedTuple):
    """The options that a command calls the data by, for messages."""

    dataset: str = "--dataset_name"
    config: str = "--dataset_config_name"
    split: str = "--dataset_split"
    image_column: str = "--image_column"
    caption_column: str = "--caption_column"
    folder: str = "--input_dir"  # for a folder of images without captions


@dataclass(frozen=True)
class DataFlags:
    """Which data, in the words of the training scripts' flags; exactly one of `folder` and `dataset` is given."""

    folder: str | None = None
    dataset: str | None = None
    config: str | None = None
    split: str = "train"
    image_column: str | None = "image"
    caption_column: str | None = None
    cache_dir: str | None = None
    spelling: Spelling = Spelling()


def read_training_data(flags: DataFlags) -> TrainingData:
    """The images of a folder or a data set; no image is decoded.

    Raises:
        UserError: the data cannot be read, lack what was asked for, or have no image.
    """
    with uncollected():
        found = read_dataset(flags) if flags.dataset is not None else read_folder(Path(flags.folder or ""))
    if not found.images:
        raise UserError(f"{flags.dataset or flags.folder} has no images; put some in it.")
    return found


def is_training_file(name: str) -> bool:
    """Is a file of this name trained on? Hidden files and those that desktops write are not."""
    return not name.startswith(".") and name.lower() not in SYSTEM_FILES


class UnreadableFile(UserError):
    """A file of the training data that cannot be read; `reason` is to stand after its name."""

    def __init__(self, file: Path, reason: str) -> None:
        """`reason`: a verb and what follows it."""
        super().__init__(f"{file} {reason}; fix or remove it.")
        self.reason = reason


def file_content(file: Path) -> Callable[[], bytes]:
    """A function that reads a file; it raises UnreadableFile where it cannot."""

    def read() -> bytes:
        try:
            if (size := file.stat().st_size) > MOST_BYTES:
                raise UnreadableFile(file, f"has {size / 2**30:.1f} GiB, more than the {MOST_BYTES >> 30} of an image")
            return file.read_bytes()
        except OSError as error:
            raise UnreadableFile(file, f"cannot be read ({error.strerror})") from None

    return read


def image_of_file(file: Path, caption: str | None = None) -> TrainingImage:
    """A file as a training image."""
    return TrainingImage(str(file), file_content(file), caption, (file, None))


def read_folder(folder: Path, option: str = "--input_dir") -> TrainingData:
    """The files of a folder, in the order of their names; each has to be an image.

    Raises:
        UserError: the folder cannot be read, is empty, or has sub-folders; the text names `option`.
    """
    if not folder.is_dir():
        raise UserError(f"{option}={folder} is not a directory; give a folder of images.")
    try:
        # Names compare faster than paths, and what a name is comes with it: there may be a great many.
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(
            f"{option}={folder} cannot be read ({error.strerror}); give a folder that you may read."
        ) from None
    if not entries:
        raise UserError(f"{option}={folder} is empty; put the images of the subject in it.")
    hidden = [(entry.name, "a hidden or system file") for entry in entries if not is_training_file(entry.name)]
    visible = [entry for entry in entries if is_training_file(entry.name)]
    if others := [entry for entry in visible if not _is_file(entry)]:
        folders = [entry.name for entry in others if os.path.isdir(entry.path)]
        kind = "folders" if folders else "what is not a file, such as broken links or pipes"
        names = ", ".join((folders or [entry.name for entry in others])[:5])
        raise UserError(f"{option}={folder} contains {kind} ({names}); it must contain only images.")
    return TrainingData([image_of_file(folder / entry.name) for entry in visible], hidden)


def _is_file(entry: os.DirEntry) -> bool:
    """Without a look at the file, unless it is a link."""
    return entry.is_file(follow_symlinks=False) or os.path.isfile(entry.path)


def read_class_folder(folder: Path, count: int) -> TrainingData:
    """The images of a class folder, by name, at most `count`; other files are left out."""
    files = picture_files(folder)
    kept = files[:count]
    seen = set(kept)
    reasons = {file: f"more than --num_class_images={count}" for file in files[count:]}
    left_out = [
        (entry.name, reasons.get(entry, "not named as an image file"))
        for entry in sorted(folder.iterdir())
        if entry not in seen
    ]
    return TrainingData([image_of_file(file) for file in kept], left_out)


def read_dataset(flags: DataFlags) -> TrainingData:
    """The rows of a data set: parquet files, an image folder with metadata, or a hub name.

    Raises:
        UserError: it cannot be loaded; a split or column is not there; a row has no image, or a caption
            that is not text.
    """
    splits = _load(flags)
    rows, image_column, caption_column = _undecoded(flags, splits)
    captions = rows[caption_column][:] if caption_column else [None] * len(rows)
    reader = _Cells.of(flags, rows, image_column)
    images = [reader.image(row, caption) for row, caption in enumerate(captions)]
    return TrainingData(images, _left_out(flags, splits, image_column, images))


def _left_out(
    flags: DataFlags, splits: Mapping[str, datasets.Dataset], image_column: str, images: Sequence[TrainingImage]
) -> list[tuple[str, str]]:
    """What of the data set is not trained on, with the reason."""
    others = {name: split for name, split in splits.items() if name != flags.split}
    found = [(f"{name} with {split.num_rows} rows", "other splits") for name, split in others.items()]
    if not (root := Path(flags.dataset or "")).exists():
        return found
    named = {image.origin[0].resolve() for image in images if image.origin}
    builder = splits[flags.split].info.builder_name
    for split in others.values() if builder == IMAGE_FOLDER else ():
        named |= _Cells.of(flags, _encoded(split, image_column), image_column).files()
    return found + files_not_read(root, builder, named)


def load_rows(flags: DataFlags) -> tuple[datasets.Dataset, str, str | None]:
    """All columns of a data set, and the names of the one with images, undecoded, and of the one with captions.

    Raises:
        UserError: it cannot be loaded, or a split or column is not there.
    """
    return _undecoded(flags, _load(flags))


def _encoded(rows: datasets.Dataset, image_column: str) -> datasets.Dataset:
    """The rows with images as the bytes or paths that they are."""
    import datasets

    return rows.cast_column(image_column, datasets.Image(decode=False))


def _undecoded(
    flags: DataFlags, splits: Mapping[str, datasets.Dataset]
) -> tuple[datasets.Dataset, str, str | None]:
    name = flags.dataset or ""
    if flags.split not in splits:
        raise UserError(
            f"{flags.spelling.split}={flags.split} is not a split of {name}, which has {', '.join(splits)}; give one "
            "of them."
        )
    rows = splits[flags.split]
    image_column, caption_column = _columns(flags, name, rows.column_names)
    kind = rows.features[image_column]
    wrong = f"{flags.spelling.image_column}={image_column} of {name} has {kind!r:.200}, expected images"
    if not is_image_type(kind):
        raise UserError(f"{wrong} as bytes or paths; give the column with the images.")
    try:
        if (small := _without_large_types(kind)) != kind:
            rows = rows.cast_column(image_column, small)
        return _encoded(rows, image_column), image_column, caption_column
    except Exception as error:  # noqa: BLE001  # of datasets and pyarrow, with no common base
        raise UserError(f"{wrong} ({type(error).__name__}); give the column with the images.") from None


def _load(flags: DataFlags) -> Mapping[str, datasets.Dataset]:
    """The splits of a data set by name."""
    import datasets

    name, root = flags.dataset or "", Path(flags.dataset or "")
    if not root.exists() and not HUB_NAME.fullmatch(name):
        raise UserError(
            f"{flags.spelling.dataset}={name} is neither a directory nor a hub name; give a folder with parquet files."
        )
    if root.exists():
        check_files(f"{flags.spelling.dataset}={name}", root, flags.spelling.folder)
    level = datasets.logging.get_verbosity()
    try:
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs errors that it raises as well
        return datasets.load_dataset(name, flags.config, cache_dir=flags.cache_dir)
    except Exception as error:  # noqa: BLE001  # of datasets, its file systems, pyarrow and pandas
        why = why_not_loaded(error, root if root.exists() else None, flags.spelling.config)
        raise UserError(f"{flags.spelling.dataset}={name} cannot be loaded {why}") from None
    finally:
        datasets.logging.set_verbosity(level)


def _columns(flags: DataFlags, name: str, there: Sequence[str]) -> tuple[str, str | None]:
    """The image column and the caption column."""
    image_column, caption_column = flags.image_column or there[0], flags.caption_column or None
    for option, column in (
        (flags.spelling.image_column, image_column), (flags.spelling.caption_column, caption_column)
    ):  # fmt: skip
        if column is not None and column not in there:
            raise UserError(f"{option}={column} is not a column of {name}; its columns are {', '.join(there)}.")
    return image_column, caption_column


def _without_large_types(kind: Any) -> Any:  # noqa: ANN401  # a feature of `datasets`, which nests
    """The column's type with 32-bit offsets: some writers take 64-bit ones, which `datasets.Image` does not."""
    import datasets

    if isinstance(kind, dict):
        return {name: _without_large_types(inner) for name, inner in kind.items()}
    if isinstance(kind, datasets.Value) and kind.dtype.startswith("large_"):
        return datasets.Value(kind.dtype.removeprefix("large_"))
    return kind


def _arrow_file(rows: datasets.Dataset) -> Path | None:
    """The one file that holds the rows, None where there are several or none."""
    files = [Path(file["filename"]) for file in rows.cache_files]
    return files[0] if len(files) == 1 else None


@dataclass(frozen=True)
class _Cells:
    """The image cells of a data set `name`: bytes, or the path of a file.

    `root`: the directory that paths may lead into, None for a data set of the hub, whose files are in the hub's cache.
    """

    name: str
    root: Path | None
    cells: pyarrow.ChunkedArray
    file: Path | None
    folders: list[Path]
    caption_option: str

    @classmethod
    def of(cls, flags: DataFlags, rows: datasets.Dataset, image_column: str) -> _Cells:
        """`rows`: of a split, with images undecoded."""
        name, root = flags.dataset or "", Path(flags.dataset or "")
        local = root.exists()
        folders = sorted({file.parent for file in parquet_files(root)}) if local else []
        cells = rows.with_format("arrow")[:].column(image_column)
        caption_option = flags.spelling.caption_column
        return cls(name, root.resolve() if local else None, cells, _arrow_file(rows), folders, caption_option)

    def files(self) -> set[Path]:
        """The image files that cells name, resolved."""
        paths = (cell["path"].as_py() for cell in self.cells if cell.is_valid and not cell["bytes"].is_valid)
        places = (folder / path for path in paths if path for folder in (self.root or Path(), *self.folders))
        return {place.resolve() for place in places}

    def image(self, row: int, caption: object) -> TrainingImage:
        where = f"{self.name}, row {row}"
        cell = self.cells[row]
        inside = cell.is_valid and cell["bytes"].is_valid and len(cell["bytes"].as_buffer()) > 0
        if not inside and not (cell.is_valid and cell["path"].is_valid):
            raise UserError(f"{where} has no image; fix or remove the row.")
        text = first_caption(caption, where, self.caption_option)
        if inside:
            return TrainingImage(where, lambda: self.cells[row]["bytes"].as_py(), text, self.file and (self.file, row))
        file = self._file(str(cell["path"]), where)
        return TrainingImage(where, file_content(file), text, (file, None))

    def _file(self, path: str, where: str) -> Path:
        """The file that a cell names; it lies in the data set's directory."""
        if not path or "\0" in path:
            raise UserError(f"{where} has no image; fix or remove the row.")
        if "://" in path:
            raise UserError(f"{where} names the address {path}; download the images into the data set.")
        if self.root is None:
            return Path(path)
        found = next((folder / path for folder in (self.root, *self.folders) if (folder / path).is_file()), None)
        if found is None:
            raise UserError(f"{where} names {path}, which is not there; fix or remove the row.")
        if not found.resolve().is_relative_to(self.root):
            raise UserError(f"{where} names {path}, which is outside {self.root}; move the file into the data set.")
        return found


def first_caption(caption: object, where: str, option: str = "--caption_column") -> str | None:
    """A caption, or the first of several; a blank one counts as none.

    Raises:
        UserError: it is not text; the message names the row `where` and the `option` that chose the column.
    """
    if isinstance(caption, list | tuple):
        caption = caption[0] if caption else None
    if not isinstance(caption, str | None):
        raise UserError(f"{where} has the caption {caption!r:.80}, expected text; see {option}.")
    return caption if caption and caption.strip() else None
