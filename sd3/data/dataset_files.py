"""The files of a local data set, as `datasets` finds them: which count, what is wrong with them, what is not read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sd3.common.command_line import UserError
from sd3.common.pictures import picture_files

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
IMAGE_FOLDER = "imagefolder"
PATTERNS = ("*", "?", "[", "::")  # in a path `datasets` takes them for a pattern or several file systems
LONGEST_REASON = 300


def parquet_files(root: Path) -> list[Path]:
    """The tables of a data set; `datasets` passes over what is hidden or has two underscores."""
    found = (file for file in root.rglob("*.parquet") if not file.is_dir())
    return sorted(file for file in found if not _is_special(file.relative_to(root)))


def _is_special(path: Path) -> bool:
    return any(name.startswith((".", "__")) for name in path.parts)


def check_files(named: str, root: Path, folder_option: str) -> None:
    """Raise UserError where a local data set cannot be one, before `datasets` takes it for something else.

    `named`: option and value, for messages; `folder_option`: the one for a folder of images.
    """
    if not root.is_dir():
        raise UserError(f"{named} is a file; give the folder that it is in.")
    if found := [each for each in PATTERNS if each in str(root.resolve())]:
        signs = " ".join(found)
        raise UserError(f"{named} has {signs} in its path, which has a meaning in patterns; rename the folder.")
    files = parquet_files(root)
    if not files and not _metadata(root):
        raise UserError(
            f"{named} has no .parquet file and no metadata.jsonl or metadata.csv; for a folder of images use "
            f"{folder_option}={root}."
        )
    if files and sum(map(_rows_of, files)) == 0:
        raise UserError(f"{named} has no images, its tables have no rows; give another data set.")


def _rows_of(file: Path) -> int:
    """How many rows a table has, from its footer."""
    import pyarrow
    import pyarrow.parquet

    if not file.is_file():  # opening a named pipe would wait for its other end
        raise UserError(f"{file} is not a file; remove it.")
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            return table.metadata.num_rows
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{file} cannot be read as parquet ({type(error).__name__}); download it again.") from None


def why_not_loaded(error: BaseException, root: Path | None, config_option: str) -> str:
    """Of what `datasets` raises: the cause in brackets, and what to do; `root`: the folder of a local data set."""
    cause = error.__cause__ or error
    text = " ".join(str(cause).split()) or type(cause).__name__
    if len(text) > LONGEST_REASON:  # what is wrong stands at either end
        text = f"{text[: LONGEST_REASON // 2]} … {text[-LONGEST_REASON // 2 :]}"
    if root is None or "config" in text.lower():
        return f"({text}); see {config_option}."
    if _metadata(root):
        return f"({text}); each row of the metadata needs a file_name, and each column values of one kind."
    return f"({text}); expected are tables of the same columns and kinds."


def _metadata(root: Path) -> list[Path]:
    return sorted(file for name in METADATA for file in root.rglob(name))


def is_image_type(kind: Any) -> bool:  # noqa: ANN401  # a feature of `datasets`
    """Can a column of this type hold encoded images: bytes, paths, or both?"""
    import datasets

    if isinstance(kind, dict):
        return bool({"bytes", "path"} & kind.keys())
    of_bytes = ("binary", "large_binary", "string", "large_string", "null")
    return isinstance(kind, datasets.Image) or (isinstance(kind, datasets.Value) and kind.dtype in of_bytes)


def files_not_read(root: Path, builder: str, named: set[Path]) -> list[tuple[str, str]]:
    """Files of a local data set that are neither images of it nor read for rows, with the reason.

    Args:
        root: its folder.
        builder: how `datasets` read it, IMAGE_FOLDER or "parquet".
        named: the image files that rows of any split name, resolved.
    """
    metadata = _metadata(root)
    if builder == IMAGE_FOLDER:
        tables = [file for file in parquet_files(root) if file.name not in METADATA]
        unread = [(file, "the rows come from metadata of images") for file in tables]
    else:
        unread = [(file, "the rows come from parquet files") for file in metadata if file.name != METADATA[2]]
    folders = [root, *(path for path in sorted(root.rglob("*")) if path.is_dir())] if metadata else []
    images = [file for folder in folders for file in picture_files(folder)]
    unread += [(file, "no row of the metadata names it") for file in images if file.resolve() not in named]
    return [(str(file.relative_to(root)), why) for file, why in unread]
