"""What a run ran on: versions, device, and the ids of the patched files, as JSON."""

from __future__ import annotations

import argparse
import json
import platform
import socket
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "torch", "torchvision", "torch_npu", "diffusers", "transformers", "accelerate", "peft", "deepspeed", "datasets",
    "numpy", "huggingface_hub",
)  # fmt: skip


def environment(device: str) -> dict[str, object]:
    """Versions of the packages present, the device's name, and the queue's ids; nothing of the user's environment."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    names: list[str] = []
    if device != "cpu":
        import torch

        module = getattr(torch, device)
        names = [module.get_device_name(index) for index in range(module.device_count())]
    pin = dict(
        line.split("=", 1)
        for line in (PROJECT / "patches" / "upstream.env").read_text(encoding="utf-8").splitlines()
        if line.startswith("UPSTREAM_") and "FILES" not in line
    )
    queue = (PROJECT / "patches" / "series").read_text(encoding="utf-8").splitlines()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "device": device,
        "device_names": names,
        "packages": versions,
        "upstream_commit": pin.get("UPSTREAM_COMMIT"),
        "patches": [line for line in queue if line and not line.startswith("#")],
        "patched_ids": [
            line.split()[::2]
            for line in (PROJECT / "patches" / "upstream.env").read_text(encoding="utf-8").splitlines()
            if line.startswith("examples/")
        ],
    }


def main(arguments: list[str] | None = None) -> int:
    """Print the JSON; returns the exit code."""
    parser = argparse.ArgumentParser(description="Print versions, device and patch ids as JSON.")
    parser.add_argument("--device", default="cpu", choices=("npu", "cuda", "cpu"))
    json.dump(environment(parser.parse_args(arguments).device), sys.stdout, indent=2)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
