"""How a run ends early without losing anything: on a signal, together on all ranks, and alone in its directory."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import torch
from torch import distributed

from sd3.common import refusals
from sd3.common.command_line import UserError

logger = logging.getLogger(__name__)
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SAME_SIGNAL = 0.5  # s within which a second one is the first, come by another way: from a scheduler and the launcher
LOCK = ".training.lock"


class Stopper:
    """Takes note of SIGTERM, SIGINT and SIGHUP; a second signal, half a second later or more, ends the process at once.

    Under a supervisor a second one changes nothing: of a signal to all processes several copies arrive, by scheduler,
    launcher and supervisor, and it is the supervisor who knows whether the user insists.

    The ranks see a signal at different moments and must write their checkpoint at the same step. So the numbers of
    their signals are combined at the end of each step, on the CPU: no device waits for it.
    """

    def __init__(self) -> None:
        """Install the handlers."""
        self.caught = 0
        self._caught_at = 0.0
        self._group = None
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            self._group = distributed.new_group(backend="gloo")
        self._flag = torch.zeros(1, dtype=torch.int64)
        self._pending: distributed.Work | None = None
        self._supervised = refusals.ADDRESS in os.environ
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.caught:
            self.caught, self._caught_at = number, now
        elif now - self._caught_at >= SAME_SIGNAL and not self._supervised:
            os._exit(128 + number)

    def ask(self) -> None:
        """Begin to combine what the ranks have caught so far; call it when a step has been computed."""
        self._flag[0] = self.caught
        if self._group is not None:
            self._pending = distributed.all_reduce(
                self._flag, op=distributed.ReduceOp.MAX, group=self._group, async_op=True
            )

    def answer(self) -> int:
        """The signal to stop on after this step, 0 for none; the same on all ranks."""
        if self._pending is None:
            return self.caught
        self._pending.wait()
        return int(self._flag[0])

    def release(self, done: str) -> None:
        """From here on a signal ends the process at once, and one that came already does so now; `done` says why."""

        def end(number: int, _frame: FrameType | None = None) -> None:
            logger.warning("Stopped by signal %d; %s.", number, done)
            os._exit(128 + number)

        for number in SIGNALS:
            if signal.getsignal(number) == self._handle:
                signal.signal(number, end)
        if self.caught:
            end(self.caught)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold the directory for this process; where its file system has no locks, that is said and nothing held.

    Raises:
        UserError: another run holds it, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("w")
    except OSError as error:
        raise UserError(
            f"--output_dir={folder} cannot be written ({error.strerror}); name another directory."
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--output_dir={folder} is in use by a run that is still going; wait for it or name another."
            ) from None
        except OSError as error:
            logger.warning("%s cannot be locked (%s): see that no other run uses it.", folder, error.strerror)
        yield
