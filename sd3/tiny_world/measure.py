"""Paints captions with a pipeline directory and says what share of them the pictures show, read by the classifier.

    python -m sd3.tiny_world.measure [--model DIR] [--pairs held-out|seen] [--captions 200] [--seed 0]
        [--sheet FILE.png]

Each held-out caption has a combination that training never showed; the others are of what it showed.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from tqdm.auto import tqdm

from sd3.common.command_line import Parser, UserError, positive, seed, status_of
from sd3.common.files import new_file
from sd3.tiny_world.classifier import right
from sd3.tiny_world.grammar import ATTRIBUTES, Scene, held_out_captions, seen_captions
from sd3.tiny_world.render import SIZE

MODEL = Path(__file__).resolve().parent / "model"
STEPS, GUIDANCE = 24, 4.0
T5_MOST = 512  # the pipeline's limit of max_sequence_length
PAIRS = {"held-out": held_out_captions, "seen": seen_captions}
_BATCH = 16
_COLUMNS = 12


def load_pipeline(model: Path) -> StableDiffusion3Pipeline:
    """The pipeline of a directory, its float16 weights in float32, without a bar of its own."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(str(model), torch_dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def paint(
    pipeline: StableDiffusion3Pipeline, captions: Sequence[str], seed: int = 0, t5_tokens: int = 256,
    steps: int = STEPS,
) -> list[Image.Image]:  # fmt: skip
    """A picture of 64 by 64 for each caption; the noise of each is its own, by its place in the list."""
    pictures: list[Image.Image] = []
    for start in tqdm(range(0, len(captions), _BATCH), "painting", mininterval=1, disable=len(captions) <= _BATCH):
        chunk = list(captions[start : start + _BATCH])
        generators = [torch.Generator().manual_seed(seed * 1_000_003 + start + i) for i in range(len(chunk))]
        pictures += pipeline(
            chunk, height=SIZE, width=SIZE, num_inference_steps=steps, guidance_scale=GUIDANCE, generator=generators,
            max_sequence_length=t5_tokens,
        ).images  # fmt: skip
    return pictures


def shares(pictures: Sequence[Image.Image], told: Sequence[Scene]) -> dict[str, float]:
    """For each attribute the share of pictures, of those whose caption states it, that show it; `all` for pictures that
    show everything that their caption states."""
    hits, cases = Counter(), Counter()
    for picture, scene in zip(pictures, told, strict=True):
        shown = right(picture, scene)
        for name, hit in {**shown, "all": all(shown.values())}.items():
            hits[name] += hit
            cases[name] += 1
    return {name: hits[name] / cases[name] for name in (*ATTRIBUTES, "all") if cases[name]}


def sheet(pictures: Sequence[Image.Image], columns: int = _COLUMNS, scale: int = 1) -> Image.Image:
    """The pictures in rows, with a line between them."""
    side = SIZE * scale + 2
    rows = -(-len(pictures) // columns)
    whole = Image.new("RGB", (columns * side, rows * side), "white")
    for index, picture in enumerate(pictures):
        whole.paste(picture.resize((SIZE * scale,) * 2), (index % columns * side, index // columns * side))
    return whole


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    """The command line's options.

    Raises:
        UserError: one of them cannot be followed.
    """
    parser = Parser(description="Say what share of captions a pipeline paints right.")
    parser.add_argument("--model", type=Path, default=MODEL, help="pipeline directory (default: the one that ships)")
    parser.add_argument("--pairs", choices=PAIRS, default="held-out", help="captions to paint (default held-out)")
    parser.add_argument("--captions", type=positive, default=200, help="how many (default 200)")
    parser.add_argument("--seed", type=seed, default=0, help="seed of captions and pictures (default 0)")
    parser.add_argument("--t5-tokens", type=positive, default=256, help="T5's padded length (default 256)")
    parser.add_argument("--sheet", type=Path, help="PNG file for the first 48 pictures")
    options = parser.parse_args(arguments)
    if not (options.model / "model_index.json").is_file():
        raise UserError(f"--model={options.model} holds no model_index.json; give a pipeline directory.")
    if options.t5_tokens > T5_MOST:
        raise UserError(f"--t5-tokens={options.t5_tokens} is more than the pipeline takes; give at most {T5_MOST}.")
    if options.sheet:
        if options.sheet.suffix.lower() != ".png":
            raise UserError(f"--sheet={options.sheet} is no name of a PNG file; give one that ends in .png.")
        options.sheet.parent.mkdir(parents=True, exist_ok=True)
    return options


def measure(arguments: list[str] | None) -> None:
    """What the command line asks for; raises UserError and OSError."""
    options = options_of(arguments)
    captions, told = zip(*PAIRS[options.pairs](options.captions, options.seed), strict=True)
    pictures = paint(load_pipeline(options.model), captions, options.seed, options.t5_tokens)
    for name, share in shares(pictures, told).items():
        print(f"{name:<12}{share:7.1%}")
    if options.sheet:
        with new_file(options.sheet) as aside:
            sheet(pictures[:48]).save(aside, format="PNG")


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return status_of(lambda: measure(arguments))


if __name__ == "__main__":
    sys.exit(main())
