"""What every Python script of the project does first: get an interpreter that has the packages, and CANN for an NPU."""

from __future__ import annotations

import glob
import sys
from collections.abc import Sequence

from sd3.common import npu, venv

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "PIL", "tqdm")
NPU_DEVICES = "/dev/davinci[0-9]*"  # a container may have been given any of them, not the first


def start(packages: Sequence[str] = PACKAGES) -> None:
    """Return in an interpreter that can run the script; else run it again in the project's, or exit with status 3."""
    venv.ensure(packages)
    if {"-h", "--help"} & set(sys.argv):
        return
    # Whatever the device: with a torch_npu that does not load, neither torch nor accelerate can be imported.
    if npu.load_error() or (_wants_npu() and not npu.is_installed()):
        print(npu.how_to_load(), file=sys.stderr)
        raise SystemExit(3)


def _wants_npu() -> bool:
    """Is an NPU asked for, or there and not turned down?"""
    given = [argument.split("=", 1)[1] for argument in sys.argv if argument.startswith("--device=")]
    given += [value for option, value in zip(sys.argv, sys.argv[1:], strict=False) if option == "--device"]
    return given[-1] == "npu" if given and given[-1] != "auto" else bool(glob.glob(NPU_DEVICES))
