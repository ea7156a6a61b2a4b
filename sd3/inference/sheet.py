"""What people look at after a run, a contact sheet of prompts by seeds, and what programs read, an index."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from sd3.common.files import new_file, write_text
from sd3.common.pictures import Recipe, pictures_in

INDEX = "index.jsonl"
SHEET = "contact_sheet.png"
THUMBNAIL = 256
MARGIN = 12
ROWS_A_SHEET = 40  # more prompts go to further sheets: viewers balk at pictures of 100,000 lines
TEXT_SIZE = 15
INK, PAPER, FAINT = (28, 28, 30), (250, 250, 248), (110, 110, 115)


def write_index(folder: Path) -> int:
    """Write one JSON object a picture of the folder, its file name and its recipe, and return how many there are."""
    rows = [{"file": path.name, **dataclasses.asdict(recipe)} for path, recipe in pictures_in(folder)]
    write_text(folder / INDEX, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return len(rows)


def write_sheets(folder: Path, pictures: Sequence[tuple[Path, Recipe]]) -> list[Path]:
    """Write the contact sheets of a run: a row for each prompt, a column for each seed. Returns their paths."""
    seeds = list(dict.fromkeys(recipe.seed for _, recipe in pictures))
    rows: dict[tuple[str, str], dict[int, Path]] = {}
    for path, recipe in pictures:
        rows.setdefault((recipe.prompt, recipe.negative_prompt), {})[recipe.seed] = path
    entries = list(rows.items())
    written = []
    for number, start in enumerate(range(0, len(entries), ROWS_A_SHEET), 1):
        path = folder / (SHEET if number == 1 else SHEET.replace(".png", f"_{number}.png"))
        sheet = _sheet(entries[start : start + ROWS_A_SHEET], seeds)
        with new_file(path) as aside:
            sheet.save(aside, format="PNG")
        written.append(path)
    return written


def _sheet(rows: Sequence[tuple[tuple[str, str], dict[int, Path]]], seeds: Sequence[int]) -> Image.Image:
    font = ImageFont.load_default(TEXT_SIZE)
    line = TEXT_SIZE + 5
    width = max(MARGIN + len(seeds) * (THUMBNAIL + MARGIN), 2 * THUMBNAIL)
    letters = int((width - 2 * MARGIN) / (0.5 * TEXT_SIZE))
    captions = [textwrap.wrap(prompt, letters)[:3] for (prompt, _), _ in rows]
    heights = [len(caption) * line + 6 + THUMBNAIL + 2 * MARGIN for caption in captions]
    sheet = Image.new("RGB", (width, line + MARGIN + sum(heights)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, seed in enumerate(seeds):
        draw.text((MARGIN + column * (THUMBNAIL + MARGIN), MARGIN), f"seed {seed}", fill=FAINT, font=font)
    top = line + MARGIN
    for (_, files), caption, height in zip(rows, captions, heights, strict=True):
        draw.text((MARGIN, top + 4), "\n".join(caption), fill=INK, font=font, spacing=5)
        below = top + len(caption) * line + 6
        for column, seed in enumerate(seeds):
            if seed in files:
                with Image.open(files[seed]) as picture:
                    thumbnail = picture.convert("RGB")
                thumbnail.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
                sheet.paste(thumbnail, (MARGIN + column * (THUMBNAIL + MARGIN), below))
        top += height
    return sheet
