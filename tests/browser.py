"""Pages as a person sees them: screenshots by a headless Chromium, where there is one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
from PIL import Image

# Where there is none, there is no test of a page's looks, rather than one that cannot fail.
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HEIGHT = 1400


def screenshot(page: Path, folder: Path, width: int) -> np.ndarray:
    """Pixels [1400, width, 3] of the top of a page; `folder` takes the browser's files."""
    shown = folder / "shown.png"
    subprocess.run(
        [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
         f"--window-size={width},{HEIGHT}", f"--user-data-dir={folder / 'profile'}", f"--screenshot={shown}",
         page.as_uri()],
        capture_output=True, timeout=120, check=True,
    )  # fmt: skip
    with Image.open(shown) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def assert_looks_like_something(page: Path, folder: Path, width: int) -> None:
    """It shows text and pictures, and nothing is cut off at its sides."""
    pixels = screenshot(page, folder, width)
    assert pixels.shape == (HEIGHT, width, 3)
    paper = pixels[2, 2]
    assert (np.abs(pixels - paper).sum(axis=2) > 30).mean() > 0.02
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100
    assert (pixels[:, -4:] == paper).all()  # the margin is free: nothing runs over the edge
