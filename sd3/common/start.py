"""What every Python script of the project does first: get an interpreter that has the packages, and CANN on an NPU."""

from __future__ import annotations

import glob
import importlib.util
import subprocess
import sys
from collections.abc import Sequence

from sd3.common import venv

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "PIL", "tqdm")
NPU_DEVICES = "/dev/davinci[0-9]*"  # a container may have been given any of them, not the first


def start(packages: Sequence[str] = PACKAGES) -> None:
    """Return in an interpreter that can run the script; else run it again in the project's, or exit with status 3."""
    venv.ensure(packages)
    if not {"-h", "--help"} & set(sys.argv) and _wants_npu() and not _npu_loads():
        print(_how_to_load_npu(), file=sys.stderr)
        raise SystemExit(3)


def _how_to_load_npu() -> str:
    """What is missing on an NPU machine, in one sentence."""
    if importlib.util.find_spec("torch_npu") is None:
        return f"{sys.executable} lacks torch_npu; run: bash {venv.PROJECT / 'setup_env.sh'} --device=npu"
    # The launchers' own search, so that there is one list of usual places.
    search = ["bash", "-c", '. "$1"; cann_set_env', "bash", str(venv.PROJECT / "sd3" / "launch" / "cann.sh")]
    found = subprocess.run(search, capture_output=True, text=True)
    place = found.stdout.strip()
    return f"CANN's environment is not loaded; run: source {place}" if place else found.stderr.strip()


def _wants_npu() -> bool:
    """Is an NPU asked for, or there and not turned down?"""
    given = [argument.split("=", 1)[1] for argument in sys.argv if argument.startswith("--device=")]
    given += [value for option, value in zip(sys.argv, sys.argv[1:], strict=False) if option == "--device"]
    return given[-1] == "npu" if given and given[-1] != "auto" else bool(glob.glob(NPU_DEVICES))


def _npu_loads() -> bool:
    try:
        import torch_npu  # noqa: F401
    except (ImportError, OSError):  # what a missing library of CANN raises
        return False
    return True
