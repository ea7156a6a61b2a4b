"""The table at the end of setup_env.sh: imports everything the project uses and shows the versions."""

from __future__ import annotations

import importlib
import os
import platform
import sys
from pathlib import Path

PACKAGES = ("torch", "torchvision", "diffusers", "transformers", "accelerate", "peft", "deepspeed", "datasets")


def cann_version() -> str:
    """Version of CANN from the toolkit's own files, "unknown" where they do not say."""
    home = Path(os.environ.get("ASCEND_TOOLKIT_HOME", ""))
    for file in sorted(home.glob("*/ascend_toolkit_install.info")) + sorted(home.glob("version.cfg")):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.lower().startswith("version="):
                return line.split("=", 1)[1].strip()
    return "unknown"


def main(arguments: list[str]) -> int:
    """Print the table; arguments: device, diffusers commit, patches, training engines. Returns 1 if an import fails."""
    device, commit, patches, engines = arguments
    rows = [("Python", f"{platform.python_version()} ({sys.executable})")]
    names = [*PACKAGES, *(["torch_npu"] if device == "npu" else [])]
    failed = []
    for name in names:
        try:
            rows.append((name, str(getattr(importlib.import_module(name), "__version__", "installed"))))
        except Exception as error:  # whatever an import raises belongs in the table
            rows.append((name, f"FAILED: {error}"))
            failed.append(name)
    if device == "npu":
        rows.append(("CANN", cann_version()))
    rows += [("diffusers commit", commit), ("patches", patches), ("engines", engines), ("device", device)]
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows))
    if failed:
        print(f"cannot import {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
