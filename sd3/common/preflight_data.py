"""Can the training script read the data? Every picture is looked at, and the first thousands are decoded."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from PIL import Image

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

Item = TypeVar("Item")
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
MOST_PIXELS = 100_000_000
DECODED = 5000  # pictures decoded whole, some minutes' worth of large ones; of the others the header is read
WORTH_A_BAR = 200


def picture_problem(stream: object, decode: bool = True) -> str | None:
    """What is wrong with a picture, None if it can be decoded (without `decode`: if its header can be read)."""
    try:
        with Image.open(stream) as image:  # type: ignore[arg-type]
            if image.width * image.height > MOST_PIXELS:
                return f"has {image.width}x{image.height} pixels, more than {MOST_PIXELS // 1_000_000} million"
            if decode:
                image.load()
    except Image.DecompressionBombError:
        return f"has more than {MOST_PIXELS // 1_000_000} million pixels"
    except (OSError, ValueError, SyntaxError) as error:
        return f"cannot be read as an image ({type(error).__name__})"
    return None


def with_bar(items: Iterable[Item], total: int) -> Iterable[Item]:
    """The items, with a progress bar where there are many and a terminal shows it."""
    if total <= WORTH_A_BAR or not sys.stderr.isatty():
        return items
    from tqdm import tqdm

    return tqdm(items, desc="Looking at the images", total=total)


def check_folder(name: str) -> list[str]:
    """Problems with --input_dir, one sentence each."""
    folder = Path(name)
    if not folder.is_dir():
        return [f"--input_dir={name} is no directory; give a folder of images."]
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        return [f"--input_dir={name} cannot be read ({error.strerror}); give a folder that you may read."]
    if not entries:
        return [f"--input_dir={name} is empty; put the images of the subject in it."]
    others = [entry.name for entry in entries if not entry.is_file()]
    problems = []
    if others:
        problems.append(f"--input_dir={name} holds folders ({', '.join(others[:5])}); it must hold images alone.")
    bad = [
        f"{entry.name} {why}"
        for number, entry in enumerate(with_bar(entries, len(entries)))
        if entry.is_file() and (why := picture_problem(entry, decode=number < DECODED))
    ]
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        problems.append(f"--input_dir={name}: {'; '.join(bad[:5])}{more}; mend or remove these files.")
    return problems


def check_dataset(name: str, caption_column: str) -> list[str]:
    """Problems with --dataset_name, one sentence each; none for a hub name, which cannot be looked into."""
    root = Path(name)
    if not root.exists():
        if HUB_NAME.fullmatch(name):
            return []
        return [f"--dataset_name={name} is neither a directory nor a hub name; give a folder with parquet files."]
    files = sorted(root.rglob("*.parquet")) if root.is_dir() else []
    if not files:
        if root.is_dir() and any(root.rglob("metadata.*")):
            return []  # a folder of images with captions, which the datasets library reads
        return [f"--dataset_name={name} holds no .parquet file; for a folder of images use --input_dir={name}."]
    import pyarrow
    import pyarrow.parquet

    problems: list[str] = []
    parquets: list[tuple[Path, ParquetFile]] = []
    for file in files:
        try:
            parquets.append((file, pyarrow.parquet.ParquetFile(file)))
        except (OSError, pyarrow.ArrowException) as error:
            problems.append(f"{file} cannot be read as parquet ({type(error).__name__}); download it again.")
            continue
        columns = parquets[-1][1].schema_arrow.names
        for column, option in ((caption_column, "--caption_column"), ("image", "--image_column")):
            if column and column not in columns:
                problems.append(f"{option}={column} is no column of {file}; its columns are {', '.join(columns)}.")
    rows = sum(parquet.metadata.num_rows for _, parquet in parquets)
    if rows == 0 and not problems:
        problems.append(f"--dataset_name={name} holds no rows; give a data set with images.")
    if problems:
        return problems[:5]
    for number, (file, row, cells) in enumerate(with_bar(_rows(parquets, caption_column), rows)):
        if why := _row_problem(cells, caption_column, decode=number < DECODED):
            problems.append(f"{file}: row {row} {why}; mend or remove the row.")
            if len(problems) == 5:
                break
    return problems


def _rows(parquets: list[tuple[Path, ParquetFile]], caption_column: str) -> Iterator[tuple[Path, int, dict[str, Any]]]:
    """File, number in the file, and cells of each row, a few at a time in memory."""
    columns = ["image", caption_column] if caption_column else ["image"]
    for file, parquet in parquets:
        row = 0
        for batch in parquet.iter_batches(16, columns=columns):
            for cells in batch.to_pylist():
                yield file, row, cells
                row += 1


def _row_problem(cells: dict[str, Any], caption_column: str, decode: bool) -> str | None:
    """What is wrong with one row; a picture that is a path and not bytes is the data set's own business."""
    image = cells["image"]
    if image is None:
        return "has no image"
    if caption_column and not isinstance(cells[caption_column], str | list):
        return f"has no text in the column {caption_column}"
    content = image.get("bytes") if isinstance(image, dict) else None
    why = picture_problem(io.BytesIO(content), decode) if content else None
    return why and f"has an image that {why}"
