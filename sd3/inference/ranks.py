"""The processes that paint together, as `accelerate launch` starts them; one alone needs none of this."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

from sd3.common import devices
from sd3.common.command_line import UserError

T = TypeVar("T")
# How long one process waits for another: for the first one's plan, which may take a download, and for the last picture.
PATIENCE = timedelta(days=30)
POLL_SECONDS = 0.5


class Ranks:
    """This process among those of the launch: `index` of `count`, and the device that is its own."""

    def __init__(self) -> None:
        """Read what the launcher says of this process."""
        self.index = int(os.environ.get("RANK", "0"))
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.planned = False

    def take_device(self, requested: str) -> None:
        """Find `device`, and `torch_device`, the one that is this process's own.

        Raises:
            UserError: it is not there, or there are more processes on this machine than devices.
        """
        try:
            self.device = devices.detect(requested)
        except devices.DeviceError as error:
            raise UserError(str(error)) from None
        here = int(os.environ.get("LOCAL_WORLD_SIZE", str(self.count)))
        there = devices.count(self.device)
        if self.device != "cpu" and here > there:
            raise UserError(
                f"--num_processes={here} is more than the {there} visible {self.device} devices; use at most {there}."
            )
        own = int(os.environ.get("LOCAL_RANK", "0"))
        self.torch_device = self.device if self.device == "cpu" else f"{self.device}:{own}"

    @property
    def first(self) -> bool:
        """Is this the process that plans, talks and writes the index?"""
        return self.index == 0

    def share(self, value: T | None) -> T:
        """The value that the first process gives, for all. It goes over gloo, which needs no accelerator."""
        self.planned = True
        if self.count == 1:
            return value  # type: ignore[return-value]
        from torch import distributed

        distributed.init_process_group("gloo", timeout=PATIENCE)
        carrier = [value]
        distributed.broadcast_object_list(carrier)
        return carrier[0]  # type: ignore[return-value]

    def finish(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Wait until all are done, calling `meanwhile` now and then.

        Raises:
            UserError: another process ended early.
        """
        if self.count == 1:
            return
        from torch import distributed

        try:
            done = distributed.barrier(async_op=True)
            while not done.is_completed():
                meanwhile()
                time.sleep(POLL_SECONDS)
            done.wait()
        except RuntimeError:
            raise UserError("another process ended early; what it says stands above or in its own output.", 1) from None
        distributed.destroy_process_group()

    def say(self, sentence: str) -> None:
        """Print an error once where all say the same, and by its process where it is one's own."""
        if self.planned and self.count > 1:
            print(f"process {self.index} of {self.count}: {sentence}", file=sys.stderr)
        elif os.environ.get("LOCAL_RANK", "0") == "0":
            print(sentence, file=sys.stderr)

    def own_part(self, items: list[T]) -> list[T]:
        """This process's share: as many in a row as anybody's, so that it meets few prompts."""
        start, end = (len(items) * rank // self.count for rank in (self.index, self.index + 1))
        return items[start:end]
