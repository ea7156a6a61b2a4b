#!/usr/bin/env python3
"""Full fine-tuning of SD3 with the native engine: accelerate launch sd3/native/train_dreambooth_sd3.py --help."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])
from sd3.common.start import start  # noqa: E402


def main() -> None:
    """Train, and end the process."""
    from sd3.native.loop import leave
    from sd3.native.loop import main as train

    leave(train("full"))


if __name__ == "__main__":
    start()
    main()
