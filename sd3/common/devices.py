"""Which accelerator to use: NPU, then CUDA, then CPU."""

from __future__ import annotations

import argparse
import importlib.util
import sys

from sd3.common import npu

DEVICES = ("npu", "cuda", "cpu")


class DeviceError(RuntimeError):
    """The device asked for is not there; the text is one sentence for the user."""


def count(device: str) -> int:
    """Number of devices visible to this process; 1 for the CPU, 0 where the device or its library is missing."""
    if device == "cpu":
        return 1
    if importlib.util.find_spec("torch") is None or npu.load_error():
        return 0
    import torch

    if device == "cuda":
        return torch.cuda.device_count()
    return torch.npu.device_count() if npu.is_installed() else 0


def detect(requested: str = "auto") -> str:
    """Resolve auto, npu, cuda or cpu to a device that is there.

    Raises:
        DeviceError: `requested` is unknown, or no such device is visible.
    """
    if requested == "auto":
        return next(device for device in DEVICES if count(device) > 0)
    if requested not in DEVICES:
        raise DeviceError(f"--device={requested} is not known; use auto, npu, cuda or cpu.")
    if count(requested) == 0:
        raise DeviceError(f"--device={requested}: no {requested} device is visible; use --device=auto.")
    return requested


def main(arguments: list[str] | None = None) -> int:
    """Print "DEVICE COUNT" for the shell launchers; returns the exit code."""
    parser = argparse.ArgumentParser(description="Print the device and how many of it are visible.")
    parser.add_argument("--device", default="auto")
    requested = parser.parse_args(arguments).device
    if npu.load_error():  # a training would stop at `import torch`, on a CPU too
        print(npu.how_to_load(), file=sys.stderr)
        return 3
    try:
        device = detect(requested)
    except DeviceError as error:
        print(error, file=sys.stderr)
        return 2
    print(device, count(device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
