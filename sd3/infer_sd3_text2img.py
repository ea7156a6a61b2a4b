#!/usr/bin/env python3
"""Pictures from prompts, with SD3, SD3.5 or a full fine-tune of them: python sd3/infer_sd3_text2img.py --help."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
from sd3.common.start import start  # noqa: E402

# For those who would rather edit than type; each is also a flag, which wins.
MODEL_PATH = "stabilityai/stable-diffusion-3.5-large"  # model directory, hub name, run directory or checkpoint
DTYPE = None  # "float16", "bfloat16" or "float32"; None: float16 on npu and cuda, float32 on a cpu
OUTPUT_DIR = "infer_result"
SEEDS = [8, 23, 42, 1334]
PROMPTS = [
    "a photo of sks dog asleep in a wicker basket, moonlight through a window",
    "a photo of sks dog on a stone bridge in an old town, evening rain, street lamps",
    "a photo of sks dog behind a wooden sign that reads WELCOME, golden hour",
    "three large dogs on a velvet sofa, studio portrait, dark background",
    "eight kittens and a puppy in a rowing boat, calm lake, sunrise",
    "a tiny city built of mushrooms and glass, fireflies, macro photograph",
    "a tabby cat with round spectacles reading a newspaper, oil painting",
    "a robot dog with brass joints in a neon-lit alley, night, wide shot",
]


def main() -> int:
    """Paint; returns the exit status."""
    from sd3.inference.options import Defaults
    from sd3.inference.prompts import Prompt
    from sd3.inference.run import main as run

    prompts = [Prompt(text) for text in PROMPTS]
    return run(Defaults(__doc__, MODEL_PATH, prompts, dtype=DTYPE, output_dir=OUTPUT_DIR, seeds=SEEDS))


if __name__ == "__main__":
    start()
    sys.exit(main())
