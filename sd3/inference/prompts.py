"""Prompts from a file: plain text, CSV or JSON lines."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sd3.common.command_line import UserError


class Prompt(NamedTuple):
    """What to paint, and what to keep away from; the latter counts only with a guidance scale above 1."""

    text: str
    negative: str = ""


def read_prompts(path: Path, negative: str = "") -> list[Prompt]:
    """The prompts of a file, in order; `negative` goes with those that have no negative prompt of their own.

    `.txt`: one a line; empty lines and lines that begin with # are passed over. `.csv`: a header with a column
    `prompt` and perhaps `negative_prompt`. `.jsonl`: an object a line with these keys.

    Raises:
        UserError: the file cannot be read, has another form, or holds no prompt.
    """
    readers = {".txt": _from_text, ".csv": _from_csv, ".jsonl": _from_json_lines}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"--prompts-file={path} is of no known kind; name a .txt, .csv or .jsonl file.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"--prompts-file={path} cannot be read ({why}); name a text file in UTF-8.") from None
    prompts = [Prompt(found.text.strip(), found.negative or negative) for found in reader(text, path)]
    if not prompts:
        raise UserError(f"--prompts-file={path} holds no prompt; write at least one.")
    return prompts


def _from_text(text: str, path: Path) -> Iterator[Prompt]:
    for line in text.split("\n"):
        if line.strip() and not line.lstrip().startswith("#"):
            yield Prompt(line)


def _from_csv(text: str, path: Path) -> Iterator[Prompt]:
    rows = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
    if "prompt" not in (rows.fieldnames or ()):
        raise UserError(f"--prompts-file={path} has no column 'prompt' in its first line; write a header with it.")
    for row in rows:
        if not (row["prompt"] or "").strip():
            raise UserError(f"--prompts-file={path}: line {rows.line_num} has an empty prompt; fill or remove it.")
        yield Prompt(row["prompt"], row.get("negative_prompt") or "")


def _from_json_lines(text: str, path: Path) -> Iterator[Prompt]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt, negative = row["prompt"], row.get("negative_prompt") or ""
            good = isinstance(prompt, str) and isinstance(negative, str) and prompt.strip()
        except (ValueError, KeyError, TypeError, AttributeError):
            good = False
        if not good:
            raise UserError(
                f'--prompts-file={path}: line {number} is not an object like {{"prompt": "a cat", '
                '"negative_prompt": "blurry"}; mend it.'
            )
        yield Prompt(prompt, negative)
