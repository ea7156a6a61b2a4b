"""What people look at after a run, a contact sheet of prompts by seeds, and what programs read, an index."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from sd3.common.files import new_file, write_text
from sd3.common.pictures import Recipe, pictures_in

INDEX = "index.jsonl"
SHEET = "contact_sheet.png"
SHEETS = "contact_sheet_*.png"
THUMBNAILS = (128, 256)  # a cell's side: that of the pictures within these limits
MARGIN = 12
# What is more goes to further sheets: viewers balk at pictures of 100,000 lines.
ROWS_A_SHEET, COLUMNS_A_SHEET = 40, 16
CAPTION_LINES = 3
# Fonts that know Chinese, Japanese and Korean, as they are called on the usual systems.
WIDE_FONTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei",
    "Microsoft YaHei", "SimHei", "PingFang SC", "Droid Sans Fallback", "Arial Unicode MS",
)  # fmt: skip
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
    side = max(max(recipe.height, recipe.width) for _, recipe in pictures)
    for old in folder.glob(SHEETS):  # of an earlier and longer run
        old.unlink()
    written = []
    for top in range(0, len(entries), ROWS_A_SHEET):
        for left in range(0, len(seeds), COLUMNS_A_SHEET):
            name = SHEET if not written else SHEET.replace(".png", f"_{len(written) + 1}.png")
            sheet = _sheet(entries[top : top + ROWS_A_SHEET], seeds[left : left + COLUMNS_A_SHEET], side)
            with new_file(folder / name) as aside:
                sheet.save(aside, format="PNG")
            written.append(folder / name)
    return written


def _thumbnail(path: Path, cell: int) -> Image.Image:
    """The picture as large as the cell allows; small ones are enlarged pixel by pixel."""
    with Image.open(path) as picture:
        resample = Image.Resampling.LANCZOS if max(picture.size) > cell else Image.Resampling.NEAREST
        return ImageOps.contain(picture.convert("RGB"), (cell, cell), method=resample)


def _font_for(texts: Sequence[str]) -> ImageFont.FreeTypeFont:
    """Pillow's own font, or where it lacks letters, as of Chinese, one of this machine that has them."""
    if not all(ord(letter) < 0x250 for text in texts for letter in text):
        from matplotlib import font_manager

        fonts = {font.name: font.fname for font in font_manager.fontManager.ttflist}
        if found := next((fonts[name] for name in WIDE_FONTS if name in fonts), None):
            return ImageFont.truetype(found, TEXT_SIZE)
    return ImageFont.load_default(TEXT_SIZE)


def wrap(text: str, font: ImageFont.FreeTypeFont, width: float, lines: int) -> list[str]:
    """The text in at most `lines` lines of `width` pixels; words that are wider, as in Chinese, break anywhere."""
    wrapped = [""]
    for word in re.findall(r"\S+\s*", text):
        pieces = [word] if font.getlength(word.rstrip()) <= width else list(word)
        for piece in pieces:
            if wrapped[-1] and font.getlength(wrapped[-1] + piece.rstrip()) > width:
                wrapped.append("")
            wrapped[-1] += piece
    if len(wrapped) > lines:
        wrapped[lines - 1] = wrapped[lines - 1].rstrip() + " ..."
    return wrapped[:lines]


def _sheet(rows: Sequence[tuple[tuple[str, str], dict[int, Path]]], seeds: Sequence[int], side: int) -> Image.Image:
    cell = min(max(side, THUMBNAILS[0]), THUMBNAILS[1])
    font = _font_for([prompt for (prompt, _), _ in rows])
    line = TEXT_SIZE + 5
    width = max(MARGIN + len(seeds) * (cell + MARGIN), 2 * THUMBNAILS[1])
    captions = [wrap(prompt, font, width - 2 * MARGIN, CAPTION_LINES) for (prompt, _), _ in rows]
    heights = [len(caption) * line + 6 + cell + 2 * MARGIN for caption in captions]
    sheet = Image.new("RGB", (width, line + MARGIN + sum(heights)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, seed in enumerate(seeds):
        draw.text((MARGIN + column * (cell + MARGIN), MARGIN), f"seed {seed}", fill=FAINT, font=font)
    top = line + MARGIN
    for (_, files), caption, height in zip(rows, captions, heights, strict=True):
        draw.text((MARGIN, top + 4), "\n".join(caption), fill=INK, font=font, spacing=5)
        below = top + len(caption) * line + 6
        for column, seed in enumerate(seeds):
            if seed in files:
                sheet.paste(_thumbnail(files[seed], cell), (MARGIN + column * (cell + MARGIN), below))
        top += height
    return sheet
