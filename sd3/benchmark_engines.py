#!/usr/bin/env python3
"""The patched upstream scripts against our engine, in alternation: python sd3/benchmark_engines.py --help."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
from sd3.common.start import start  # noqa: E402


def main() -> int:
    """Measure; returns the exit status."""
    from sd3.native.benchmark import main as run

    return run(sys.argv[1:], script=Path(__file__).resolve())


if __name__ == "__main__":
    start()
    sys.exit(main())
