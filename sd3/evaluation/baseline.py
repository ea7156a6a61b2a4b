"""A captioned data set, its training split divided by seed into rows to train on and held-out rows."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

from sd3.common.command_line import UserError
from sd3.common.files import new_directory
from sd3.data.training_data import DataFlags, Spelling, TrainingImage, load_rows, read_training_data
from sd3.evaluation.images import ImageSource

# Without options for the rest: a published data set has its images in `image` and a `train` split.
SPELLING = Spelling(
    "--dataset", "--dataset", "--dataset: split", "--dataset: image column", "--caption-column", "--reference-dir"
)


@dataclasses.dataclass(frozen=True)
class Split:
    """Held-out rows of a data set. `rows` are their numbers, from 0, of its training split."""

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


def _flags(dataset: Path, caption_column: str) -> DataFlags:
    return DataFlags(dataset=str(dataset), caption_column=caption_column, spelling=SPELLING)


def _read(dataset: Path, caption_column: str) -> list[TrainingImage]:
    found = read_training_data(_flags(dataset, caption_column)).images
    if len(found) < 2:
        raise UserError(f"--dataset={dataset} has {len(found)} rows; give one with at least 2.")
    return found


def _caption(image: TrainingImage) -> str:
    if image.caption is None:
        raise UserError(f"{image.name} has no caption; fix or remove the row.")
    return " ".join(image.caption.split())


def _source(image: TrainingImage) -> ImageSource:
    file, row = image.origin or (None, None)
    if file is None or row is not None:
        return ImageSource(image.name, content=image.content())
    return ImageSource(str(file), file)


def read_split(dataset: Path, fraction: float, seed: int, caption_column: str = "text") -> Split:
    """The held-out rows of a data set's training split.

    Raises:
        UserError: it cannot be read, or a held-out row lacks its image or caption.
    """
    images = _read(dataset, caption_column)
    rows = held_out_rows(len(images), fraction, seed)
    kept = [images[row] for row in rows]
    captions = [_caption(image) for image in kept]
    return Split(str(dataset), seed, fraction, len(images), rows, captions, [_source(image) for image in kept])


def write_training_rows(dataset: Path, output: Path, fraction: float, seed: int, caption_column: str = "text") -> int:
    """Write the rows that are not held out as a data set to train on; returns how many.

    Raises:
        UserError: the data set cannot be read, or `output` cannot be made or holds something already.
    """
    import datasets
    import pyarrow.parquet

    images = _read(dataset, caption_column)
    held_out = set(held_out_rows(len(images), fraction, seed))
    numbers = [row for row in range(len(images)) if row not in held_out]
    rows, image_column, _ = load_rows(_flags(dataset, caption_column))
    # Files beside the tables do not move with them: every row gets its image's bytes.
    cells = [{"bytes": images[row].content(), "path": None} for row in numbers]
    features = datasets.Features({**rows.features, image_column: datasets.Image()})
    table = rows.select(numbers).with_format("arrow")[:]
    place = table.column_names.index(image_column)
    kind = features.arrow_schema.field(image_column)
    table = table.set_column(place, kind, pyarrow.array(cells, kind.type)).cast(features.arrow_schema)
    try:
        with new_directory(output, "--training-split") as aside:
            (aside / "data").mkdir()
            pyarrow.parquet.write_table(table, aside / "data" / "train-00000-of-00001.parquet")
    except OSError as error:
        raise UserError(str(error)) from None
    return len(numbers)
