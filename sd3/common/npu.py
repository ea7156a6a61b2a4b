"""Does torch_npu load? It needs CANN's libraries and environment, which are not there until they are sourced."""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys

from sd3.common import venv

AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"


def is_installed() -> bool:
    """Is torch_npu there, whether or not it loads?"""
    return importlib.util.find_spec("torch_npu") is not None


@functools.cache
def load_error() -> str:
    """Why torch_npu, which is installed, does not load, as its own first line; empty where it loads or is not there.

    Call it before torch is imported for the first time: from torch 2.5 on, `import torch` loads torch_npu by itself,
    and where that fails torch cannot be imported in this process any more.
    """
    if not is_installed():
        return ""
    before = os.environ.get(AUTOLOAD)
    os.environ[AUTOLOAD] = "0"
    try:
        import torch  # noqa: F401
        import torch_npu  # noqa: F401
    except Exception as error:  # ImportError, OSError, RuntimeError or a plain Exception, by what of CANN is missing
        return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    finally:
        os.environ.pop(AUTOLOAD)
        if before is not None:
            os.environ[AUTOLOAD] = before
    return ""


def how_to_load() -> str:
    """What to do where torch_npu is missing or does not load, in one sentence."""
    if not is_installed():
        return f"{sys.executable} lacks torch_npu; run: bash {venv.PROJECT / 'setup_env.sh'} --device=npu"
    # The launchers' own search, so that there is one list of usual places.
    search = ["bash", "-c", '. "$1"; cann_set_env', "bash", str(venv.PROJECT / "sd3" / "launch" / "cann.sh")]
    found = subprocess.run(search, capture_output=True, text=True)
    place = found.stdout.strip()
    advice = f"run: source {place}" if place else found.stderr.strip()
    return f"CANN's environment is not loaded, so torch_npu does not load ({load_error()}); {advice}"
