"""Which accelerator to use: NPU, then CUDA, then CPU."""

from __future__ import annotations

import argparse
import importlib.util
import sys

DEVICES = ("npu", "cuda", "cpu")


class DeviceError(RuntimeError):
    """The device asked for is not there; the text is one sentence for the user."""


def count(device: str) -> int:
    """Number of devices visible to this process; 1 for the CPU, 0 where the device or its library is missing."""
    if device == "cpu":
        return 1
    if importlib.util.find_spec("torch") is None:
        return 0
    import torch

    if device == "cuda":
        return torch.cuda.device_count()
    if importlib.util.find_spec("torch_npu") is None:
        return 0
    try:
        import torch_npu
    except ImportError:  # without CANN's libraries torch_npu does not load
        return 0
    return torch_npu.npu.device_count()


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
    try:
        device = detect(parser.parse_args(arguments).device)
    except DeviceError as error:
        print(error, file=sys.stderr)
        return 2
    print(device, count(device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
