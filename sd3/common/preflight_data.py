"""Can the training script read the data? Every picture of a folder is opened; of a parquet file the first rows are."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

from PIL import Image

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
MOST_PIXELS = 100_000_000
ROWS_LOOKED_AT = 64


def picture_problem(stream: object) -> str | None:
    """What is wrong with a picture, None if it can be decoded."""
    try:
        with Image.open(stream) as image:  # type: ignore[arg-type]
            if image.width * image.height > MOST_PIXELS:
                return f"has {image.width}x{image.height} pixels, more than {MOST_PIXELS // 1_000_000} million"
            image.load()
    except Image.DecompressionBombError:
        return f"has more than {MOST_PIXELS // 1_000_000} million pixels"
    except (OSError, ValueError, SyntaxError) as error:
        return f"cannot be read as an image ({type(error).__name__})"
    return None


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
    shown = entries
    if len(entries) > 200 and sys.stderr.isatty():
        from tqdm import tqdm

        shown = tqdm(entries, desc="Looking at the images")
    bad = [f"{entry.name} {why}" for entry in shown if entry.is_file() and (why := picture_problem(entry))]
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
    rows = 0
    for file in files:
        try:
            parquet = pyarrow.parquet.ParquetFile(file)
            rows += parquet.metadata.num_rows
            columns = parquet.schema_arrow.names
            for column, option in ((caption_column, "--caption_column"), ("image", "--image_column")):
                if column and column not in columns:
                    problems.append(f"{option}={column} is no column of {file}; its columns are {', '.join(columns)}.")
            if "image" in columns and not problems:
                batch = next(parquet.iter_batches(ROWS_LOOKED_AT, columns=["image"]), None)
                for number, cell in enumerate(batch.column(0).to_pylist() if batch else []):
                    content = cell.get("bytes") if isinstance(cell, dict) else None
                    if content and (why := picture_problem(io.BytesIO(content))):
                        problems.append(f"{file}: the image of row {number} {why}; mend or remove the row.")
        except (OSError, pyarrow.ArrowException) as error:
            problems.append(f"{file} cannot be read as parquet ({type(error).__name__}); download it again.")
    if rows == 0 and not problems:
        problems.append(f"--dataset_name={name} holds no rows; give a data set with images.")
    return problems[:5]
