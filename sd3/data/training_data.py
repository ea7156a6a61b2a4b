"""The training data that the flags name: images with captions, read the same way by checks, engines and evaluation."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sd3.common.command_line import UserError
from sd3.common.memory import uncollected
from sd3.common.pictures import picture_files

if TYPE_CHECKING:
    import datasets
    import pyarrow

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
# What desktops write into folders; a leading dot hides the rest of it.
SYSTEM_FILES = ("thumbs.db", "desktop.ini")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")

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


def file_content(file: Path) -> Callable[[], bytes]:
    """A function that reads a file; it raises UserError where it cannot."""

    def read() -> bytes:
        try:
            return file.read_bytes()
        except OSError as error:
            raise UserError(f"{file} cannot be read ({error.strerror}); fix or remove it.") from None

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
    if folders := [entry.name for entry in visible if not _is_file(entry)]:
        raise UserError(
            f"{option}={folder} contains folders ({', '.join(folders[:5])}); it must contain only images."
        )
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
    rows, image_column, caption_column = load_rows(flags)
    name, root = flags.dataset or "", Path(flags.dataset or "")
    local = root.exists()
    captions = rows[caption_column][:] if caption_column else [None] * len(rows)
    cells = rows.with_format("arrow")[:].column(image_column)
    reader = _Cells(
        name, root.resolve() if local else None, cells, _arrow_file(rows), _parquet_folders(root),
        flags.spelling.caption_column,
    )  # fmt: skip
    images = [reader.image(row, caption) for row, caption in enumerate(captions)]
    return TrainingData(images, _without_a_row(root, images) if local else [])


def load_rows(flags: DataFlags) -> tuple[datasets.Dataset, str, str | None]:
    """All columns of a data set, and the names of the one with images, undecoded, and of the one with captions.

    Raises:
        UserError: it cannot be loaded, or a split or column is not there.
    """
    import datasets

    name, root = flags.dataset or "", Path(flags.dataset or "")
    if not root.exists() and not HUB_NAME.fullmatch(name):
        raise UserError(
            f"{flags.spelling.dataset}={name} is neither a directory nor a hub name; give a folder with parquet files."
        )
    if root.exists():
        _check_layout(f"{flags.spelling.dataset}={name}", root, flags.spelling.folder)
    rows = _rows(flags, name)
    image_column, caption_column = _columns(flags, name, rows.column_names)
    kind = rows.features[image_column]
    try:
        if (small := _without_large_types(kind)) != kind:
            rows = rows.cast_column(image_column, small)
        return rows.cast_column(image_column, datasets.Image(decode=False)), image_column, caption_column
    except Exception as error:  # noqa: BLE001  # of datasets and pyarrow, with no common base
        raise UserError(
            f"{flags.spelling.image_column}={image_column} of {name} has {kind}, expected images "
            f"({type(error).__name__}); give the column with the images."
        ) from None


def _check_layout(named: str, root: Path, folder_option: str) -> None:
    """Raise UserError where a local data set cannot be one, before `datasets` takes it for something else.

    `named`: option and value, for messages; `folder_option`: the one for a folder of images.
    """
    if not root.is_dir():
        raise UserError(f"{named} is a file; give the folder that it is in.")
    files = sorted(root.rglob("*.parquet"))
    if not files and not any(root.rglob("metadata.*")):
        raise UserError(
            f"{named} has no .parquet file and no metadata.jsonl or metadata.csv; for a folder of images use "
            f"{folder_option}={root}."
        )
    import pyarrow
    import pyarrow.parquet

    rows = 0
    for file in files:
        try:
            with pyarrow.parquet.ParquetFile(file) as table:
                rows += table.metadata.num_rows
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(
                f"{file} cannot be read as parquet ({type(error).__name__}); download it again."
            ) from None
    if files and rows == 0:
        raise UserError(f"{named} has no images, its tables have no rows; give another data set.")


def _rows(flags: DataFlags, name: str) -> datasets.Dataset:
    import datasets

    try:
        splits = datasets.load_dataset(name, flags.config, cache_dir=flags.cache_dir)
    except Exception as error:  # noqa: BLE001  # of datasets, its file systems, pyarrow and pandas
        cause = error.__cause__ or error
        why = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        raise UserError(
            f"{flags.spelling.dataset}={name} cannot be loaded ({why}); see {flags.spelling.config}."
        ) from None
    if flags.split not in splits:
        raise UserError(
            f"{flags.spelling.split}={flags.split} is not a split of {name}, which has {', '.join(splits)}; give one "
            "of them."
        )
    return splits[flags.split]


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


def _parquet_folders(root: Path) -> list[Path]:
    return sorted({file.parent for file in root.rglob("*.parquet")}) if root.is_dir() else []


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


def _without_a_row(root: Path, images: list[TrainingImage]) -> list[tuple[str, str]]:
    """Image files of an image folder that its metadata do not name."""
    if not any(file for name in METADATA for file in root.rglob(name)):
        return []
    named = {image.origin[0].resolve() for image in images if image.origin}
    folders = [root, *(path for path in sorted(root.rglob("*")) if path.is_dir())]
    files = [file for folder in folders for file in picture_files(folder)]
    others = [file for file in files if file.resolve() not in named]
    return [(str(file.relative_to(root)), "no row of the metadata names it") for file in others]
