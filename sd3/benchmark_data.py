#!/usr/bin/env python3
"""What large training data cost at the start of a run: python sd3/benchmark_data.py --help."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
from sd3.common.start import start  # noqa: E402


def main() -> int:
    """Measure; returns the exit status."""
    from sd3.benchmarks.data import main as run

    return run(sys.argv[1:], script=Path(__file__).resolve())


if __name__ == "__main__":
    start()
    sys.exit(main())
