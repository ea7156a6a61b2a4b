"""The real torch_npu on emulated CANN, for tests marked `npu`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from emulated_cann.build import Unavailable, build, folder, variables
from prepared import made_once
from repository import PROJECT


class EmulatedNpu:
    """Starts programs that see cards."""

    def __init__(self, built: Path) -> None:
        """`built`: what emulated_cann/build.py made."""
        self.built = built

    def environment(self, cards: int = 1, **extra: str) -> dict[str, str]:
        """The caller's environment with `cards` cards in it."""
        disturbing = ("HF_", "ACCELERATE_", "ASCEND_")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(disturbing)}
        added = {"EMULATED_CANN_CARDS": str(cards), "OMP_NUM_THREADS": "1", "SD3_PYTHON": sys.executable}
        quiet = {"PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        kept["PYTHONPATH"] = str(PROJECT)
        return {**kept, **variables(self.built, kept), **added, **quiet, **extra}

    def run(
        self, command: list[str], cards: int = 1, timeout: float = 300, cwd: Path = PROJECT, **extra: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        environment = self.environment(cards, **extra)
        return subprocess.run(
            command, env=environment, cwd=cwd, timeout=timeout, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )

    def python(self, program: str, cards: int = 1, **extra: str) -> subprocess.CompletedProcess[str]:
        """Run a program that is given as its text."""
        return self.run([sys.executable, "-c", program], cards, **extra)


def built_or_skipped() -> EmulatedNpu:
    """Emulated CANN, built by whichever process comes first; the test is skipped where it cannot be built."""
    try:
        return EmulatedNpu(made_once(folder(), build))
    except Unavailable as error:
        pytest.skip(f"needs emulated CANN: {str(error).splitlines()[0]}")
