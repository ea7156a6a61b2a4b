#!/usr/bin/env python3
"""Compare pictures of a base model and of fine-tuned ones: python sd3/evaluate_sd3.py --help."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
from sd3.common.start import PACKAGES, start  # noqa: E402

# For those who would rather edit than type; each is also a flag, which wins.
CLIP_MODEL = "openai/clip-vit-base-patch32"  # Ruiz et al. do not say which CLIP; this one is the usual choice
DINO_MODEL = "facebook/dino-vits16"  # theirs: ViT-S/16
KID_MODEL = "inception-v3"  # torchvision's weights, or a file of weights, or a vision transformer
PROMPT_SET = "live-subject"  # "object", or a text file with a prompt on each line
SUBJECT = "sks dog"  # the rare token and the class noun, as in the prompt of the training
SEEDS = [8, 23, 42, 1334]
OUTPUT_DIR = "eval_result"


def main() -> int:
    """Evaluate; returns the exit status."""
    from sd3.evaluation.main import main as run
    from sd3.evaluation.options import Defaults

    return run(sys.argv[1:], Defaults(CLIP_MODEL, DINO_MODEL, KID_MODEL, PROMPT_SET, SUBJECT, SEEDS, OUTPUT_DIR))


if __name__ == "__main__":
    start((*PACKAGES, "torchvision", "torchmetrics", "jinja2", "pyarrow", "datasets"))
    sys.exit(main())
