#!/usr/bin/env python3
"""A picture and a prompt become another picture: python sd3/infer_sd3_img2img.py --help."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
from sd3.common.start import start  # noqa: E402

# For those who would rather edit than type; each is also a flag, which wins.
MODEL_PATH = "stabilityai/stable-diffusion-3.5-large"  # model directory, hub name, run directory or checkpoint
DTYPE = None  # "float16", "bfloat16" or "float32"; None: float16 on npu and cuda, float32 on a cpu
OUTPUT_DIR = "infer_result"
IMAGE = "https://huggingface.co/datasets/huggingface/documentation-images/resolve/main/diffusers/cat.png"
PROMPT = "a cat dressed as a wizard, pointed hat, long grey beard, storybook illustration, fine detail"
EXAMPLE_NAME = "cat_wizard.png"  # what the picture of this very example is called
SEED = 8
STEPS = 50
GUIDANCE_SCALE = 7.0
STRENGTH = 0.6


def main() -> int:
    """Paint; returns the exit status."""
    from sd3.inference.options import Defaults
    from sd3.inference.prompts import Prompt
    from sd3.inference.run import main as run

    settings = Defaults(
        __doc__, MODEL_PATH, [Prompt(PROMPT)], dtype=DTYPE, output_dir=OUTPUT_DIR, seeds=[SEED], steps=STEPS,
        guidance_scale=GUIDANCE_SCALE, image=IMAGE, strength=STRENGTH, example_name=EXAMPLE_NAME,
    )  # fmt: skip
    return run(settings)


if __name__ == "__main__":
    start()
    sys.exit(main())
