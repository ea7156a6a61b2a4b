"""What a run ran on, as JSON: versions, device, engine; the patched scripts' ids where it is they that train."""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import socket
import sys
from pathlib import Path

from sd3.common.package_versions import package_versions

PROJECT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "torch", "torchvision", "torch_npu", "diffusers", "transformers", "accelerate", "peft", "deepspeed", "datasets",
    "numpy", "huggingface_hub",
)  # fmt: skip


def library(versions: dict[str, str]) -> str:
    """Which diffusers the engine runs on: a release, or the checkout that set-up patched."""
    spec = importlib.util.find_spec("diffusers")
    checkout = PROJECT / "build" / "diffusers"
    ours = spec and spec.origin and checkout.resolve() in Path(spec.origin).resolve().parents
    return f"diffusers {versions.get('diffusers', 'unknown')}, {'from build/diffusers' if ours else 'as installed'}"


def patched_scripts() -> dict[str, object]:
    """The pin, the queue, and the ids that the queue leaves."""
    pin = (PROJECT / "patches" / "upstream.env").read_text(encoding="utf-8").splitlines()
    queue = (PROJECT / "patches" / "series").read_text(encoding="utf-8").splitlines()
    return {
        "upstream_commit": next((line.split("=", 1)[1] for line in pin if line.startswith("UPSTREAM_COMMIT=")), None),
        "patches": [line for line in queue if line and not line.startswith("#")],
        "patched_ids": [line.split()[::2] for line in pin if line.startswith("examples/")],
    }


def environment(device: str, engine: str) -> dict[str, object]:
    """Versions of the packages present, the device's name, and the engine; nothing of the user's environment."""
    versions = package_versions(PACKAGES)
    names: list[str] = []
    if device != "cpu":
        import torch

        module = getattr(torch, device)
        names = [module.get_device_name(index) for index in range(module.device_count())]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "device": device,
        "device_names": names,
        "packages": versions,
        "engine": engine,
        "library": library(versions),
        **(patched_scripts() if engine == "diffusers" else {}),
    }


def main(arguments: list[str] | None = None) -> int:
    """Print the JSON; returns the exit code."""
    parser = argparse.ArgumentParser(description="Print versions, device and engine as JSON.")
    parser.add_argument("--device", default="cpu", choices=("npu", "cuda", "cpu"))
    parser.add_argument("--engine", default="native", choices=("diffusers", "native"))
    options = parser.parse_args(arguments)
    json.dump(environment(options.device, options.engine), sys.stdout, indent=2)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
