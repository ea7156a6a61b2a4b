"""A captioned data set in its published layout (data/*.parquet), split by seed into training and held-out rows."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd3.common.command_line import UserError
from sd3.common.files import new_directory
from sd3.evaluation.images import ImageSource

if TYPE_CHECKING:
    import pyarrow

IMAGE_COLUMN = "image"


@dataclasses.dataclass(frozen=True)
class Split:
    """Held-out rows of a data set. `rows` are their numbers, from 0, through all files in order of their names."""

    dataset: str
    seed: int
    fraction: float
    total: int
    rows: list[int]
    captions: list[str]
    images: list[ImageSource]

    def prompts(self) -> list[str]:
        """The held-out captions, each one once."""
        return list(dict.fromkeys(self.captions))


def held_out_rows(total: int, fraction: float, seed: int) -> list[int]:
    """Numbers of the held-out rows, at least one and never all; the same for ever, on every machine.

    Rows are ranked by a hash of seed and number, so a larger fraction holds the rows of a smaller one.
    """
    count = min(max(1, round(total * fraction)), total - 1)
    ranked = sorted(range(total), key=lambda row: hashlib.sha256(f"{seed}:{row}".encode()).digest())
    return sorted(ranked[:count])


def _table(dataset: Path, caption_column: str) -> pyarrow.Table:
    import pyarrow
    import pyarrow.parquet

    files = sorted(dataset.rglob("*.parquet")) if dataset.is_dir() else []
    if not files:
        raise UserError(f"--dataset={dataset} holds no .parquet file; give the folder of a captioned data set.")
    tables = []
    for file in files:
        try:
            table = pyarrow.parquet.read_table(file)
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(f"{file} cannot be read as parquet ({type(error).__name__}); download it again.") from None
        for column in (IMAGE_COLUMN, caption_column):
            if column not in table.column_names:
                raise UserError(
                    f"{file} has no column {column}, it has {', '.join(table.column_names)}; "
                    "name the captions' one with --caption-column."
                )
        tables.append(table)
    whole = pyarrow.concat_tables(tables)
    if whole.num_rows < 2:
        raise UserError(f"--dataset={dataset} holds {whole.num_rows} rows; give one with at least 2.")
    return whole


def _caption(cell: Any, name: str) -> str:
    text = cell[0] if isinstance(cell, list) and cell else cell
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{name} has no caption; mend or remove the row.")
    return " ".join(text.split())


def _image(cell: Any, dataset: Path, name: str) -> ImageSource:
    content = cell.get("bytes") if isinstance(cell, dict) else None
    if content:
        return ImageSource(name, content=content)
    path = cell.get("path") if isinstance(cell, dict) else None
    if path and (dataset / path).is_file():
        return ImageSource(str(dataset / path), dataset / path)
    raise UserError(f"{name} has no image; mend or remove the row.")


def read_split(dataset: Path, fraction: float, seed: int, caption_column: str = "text") -> Split:
    """The held-out rows of a data set.

    Raises:
        UserError: it cannot be read, or a held-out row lacks its image or caption.
    """
    table = _table(dataset, caption_column)
    rows = held_out_rows(table.num_rows, fraction, seed)
    cells = table.select([IMAGE_COLUMN, caption_column]).take(rows).to_pylist()
    names = [f"row {row} of {dataset}" for row in rows]
    captions = [_caption(cell[caption_column], name) for cell, name in zip(cells, names, strict=True)]
    images = [_image(cell[IMAGE_COLUMN], dataset, name) for cell, name in zip(cells, names, strict=True)]
    return Split(str(dataset), seed, fraction, table.num_rows, rows, captions, images)


def write_training_rows(dataset: Path, output: Path, fraction: float, seed: int, caption_column: str = "text") -> int:
    """Write the rows that are not held out as a data set to train on; returns how many.

    Raises:
        UserError: the data set cannot be read, or `output` cannot be made or holds something already.
    """
    import datasets
    import pyarrow.parquet

    table = _table(dataset, caption_column)
    held_out = set(held_out_rows(table.num_rows, fraction, seed))
    kept = table.take([row for row in range(table.num_rows) if row not in held_out])
    # The schema must say that the column is a picture, or the training script would see bare bytes.
    features = datasets.Features.from_arrow_schema(kept.schema)
    features[IMAGE_COLUMN] = datasets.Image()
    try:
        with new_directory(output, "--training-split") as aside:
            (aside / "data").mkdir()
            pyarrow.parquet.write_table(
                kept.cast(features.arrow_schema), aside / "data" / "train-00000-of-00001.parquet"
            )
    except OSError as error:
        raise UserError(str(error)) from None
    return kept.num_rows
