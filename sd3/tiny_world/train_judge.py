"""Trains the models that judge pictures of the tiny world, on the CPU: `clip` and `vit`, for sd3/evaluate_sd3.py.

    python -m sd3.tiny_world.train_judge --output DIR [--seed 0] [--clip-steps N] [--vit-steps N]

The same command gives the same files. Takes a quarter of an hour on one core of 2023.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from sd3.common.command_line import Parser, positive, seed, status_of
from sd3.common.files import new_directory, write_text
from sd3.tiny_world import judges

TRAINERS = {"clip": judges.train_clip, "vit": judges.train_vit}


def train(output: Path, seed: int, steps: dict[str, int]) -> dict[str, list[float]]:
    """Write the directories `clip` and `vit` below `output`, and the record of their making; returns the losses.

    `steps`: by the same names.

    Raises:
        FileExistsError: `output` exists and is not an empty directory.
    """
    losses, record = {}, {"seed": seed}
    with new_directory(output, "--output") as aside:
        for name, trainer in TRAINERS.items():
            started = time.monotonic()
            losses[name] = trainer(aside / name, seed, steps[name])
            last = losses[name][-100:]
            record[name] = {
                "steps": steps[name], "loss": round(sum(last) / len(last), 4),
                "seconds": round(time.monotonic() - started),
            }  # fmt: skip
        write_text(aside / "training.json", json.dumps(record, indent=2) + "\n")
    return losses


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(description="Train the models that judge pictures of the tiny world, on the CPU.")
    parser.add_argument("--output", type=Path, required=True, help="directory to make, with clip and vit in it")
    parser.add_argument("--seed", type=seed, default=0, help="seed of everything (default 0)")
    for name, default in (("clip", judges.CLIP_STEPS), ("vit", judges.VIT_STEPS)):
        help_ = f"steps of {name} (default {default})"
        parser.add_argument(f"--{name}-steps", type=positive, default=default, help=help_)
    return parser.parse_args(arguments)


def make(arguments: list[str] | None) -> None:
    """What the command line asks for; raises UserError and OSError."""
    started = time.monotonic()
    options = _options(arguments)
    # Sums of floats depend on how many threads share them.
    torch.set_num_threads(1)
    train(options.output, options.seed, {"clip": options.clip_steps, "vit": options.vit_steps})
    print(f"{options.output} made in {(time.monotonic() - started) / 60:.1f} minutes.")


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return status_of(lambda: make(arguments))


if __name__ == "__main__":
    sys.exit(main())
