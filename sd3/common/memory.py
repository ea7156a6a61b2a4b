"""Peak memory of a stretch of a program, of the device or, on a CPU, of the process."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SAMPLE_SECONDS = 0.002
# glibc keeps freed memory for later, which a card's allocator counts as free. With this in the environment it gives it
# back at once, which takes time: on a CPU, memory has a run of its own.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "131072"}


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection meanwhile: of a great many objects that all stay, each pass looks at all of them again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def device_module(device: torch.device) -> ModuleType | None:
    """torch.cuda or torch.npu; None for the CPU."""
    import torch

    return None if device.type == "cpu" else getattr(torch, device.type)


class PeakMemory:
    """Peak memory between enter and exit."""

    def __init__(self, device: torch.device) -> None:
        """`device`: whose memory; the CPU's is what this process holds beyond what it held on entering."""
        self._module = device_module(device)
        self._done = threading.Event()
        self._peak = self._start = 0

    def __enter__(self) -> PeakMemory:
        """Begin to watch."""
        if self._module:
            self._module.reset_peak_memory_stats()
        else:
            self._start = self._peak = _resident_bytes()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop watching."""
        if self._module:
            self._peak = self._module.max_memory_allocated()
        else:
            self._done.set()
            self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self._peak = max(self._peak, _resident_bytes())

    @property
    def peak(self) -> int:
        """Bytes; on a CPU beyond those at the start."""
        return self._peak - self._start


def _resident_bytes() -> int:
    """Memory of this process that is no file: weights mapped from a file and not yet read would not count on a CPU,
    but they would on a device. Weights in float16 files, as published, are copied when they become float32."""
    return anonymous_bytes("self")


def anonymous_bytes(process: int | str) -> int:
    """Memory of a process, by its number, that is not of a file; 0 where it has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    _, found, rest = status.partition("RssAnon:")  # a process that has ended and was not waited for has none
    return int(rest.split()[0]) * 1024 if found else 0
