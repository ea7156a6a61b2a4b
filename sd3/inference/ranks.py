"""The processes that paint together, as `accelerate launch` starts them; one alone needs none of this."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TypeVar

from sd3.common import devices
from sd3.common.command_line import UserError

T = TypeVar("T")
# How long others wait for the first one's plan: it may have to download the model.
PATIENCE = timedelta(days=1)


class Ranks:
    """This process among those of the launch: `index` of `count`, and the device that is its own."""

    def __init__(self, requested_device: str) -> None:
        """Find the device.

        Raises:
            UserError: it is not there, or there are more processes on this machine than devices.
        """
        self.index = int(os.environ.get("RANK", "0"))
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        try:
            self.device = devices.detect(requested_device)
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
        if self.count == 1:
            return value  # type: ignore[return-value]
        from torch import distributed

        distributed.init_process_group("gloo", timeout=PATIENCE)
        carrier = [value]
        distributed.broadcast_object_list(carrier)
        distributed.destroy_process_group()
        return carrier[0]  # type: ignore[return-value]

    def own_part(self, items: list[T]) -> list[T]:
        """This process's share: as many in a row as anybody's, so that it meets few prompts."""
        start, end = (len(items) * rank // self.count for rank in (self.index, self.index + 1))
        return items[start:end]
