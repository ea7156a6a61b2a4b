#!/usr/bin/env python3
"""Pictures from prompts, with a LoRA on top of SD3 or SD3.5: python sd3/infer_sd3_text2img_lora.py --help."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
from sd3.common.start import start  # noqa: E402

# For those who would rather edit than type; each is also a flag, which wins. Prompts: sd3/inference/lora_examples.py
MODEL_PATH = "stabilityai/stable-diffusion-3.5-large"  # the model that the LoRA was trained on
LORA_WEIGHTS = "./output/pytorch_lora_weights.safetensors"  # LoRA file, or run directory or checkpoint of a LoRA run
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
