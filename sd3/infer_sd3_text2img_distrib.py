#!/usr/bin/env python3
"""Pictures from prompts on several devices: accelerate launch --num_processes=4 sd3/infer_sd3_text2img_distrib.py."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
from sd3.common.start import start  # noqa: E402

# For those who would rather edit than type; each is also a flag, which wins. Prompts: sd3/inference/lora_examples.py
MODEL_PATH = "stabilityai/stable-diffusion-3.5-large"  # model directory, hub name, run directory or checkpoint
LORA_WEIGHTS = ""  # LoRA file, or run directory or checkpoint of a LoRA run; empty for none
DTYPE = None  # "float16", "bfloat16" or "float32"; None: float16 on npu and cuda, float32 on a cpu
OUTPUT_DIR = "infer_result_lora"
SEEDS = [8, 23, 42, 1334]


def main() -> int:
    """Paint; returns the exit status."""
    from sd3.inference.lora_examples import main as run

    return run(__doc__, MODEL_PATH, LORA_WEIGHTS, DTYPE, OUTPUT_DIR, SEEDS)


if __name__ == "__main__":
    start()
    sys.exit(main())
