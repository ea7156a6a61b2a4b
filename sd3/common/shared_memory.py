"""What processes that load data need of /dev/shm, and the sentence where they cannot have it. Standard library only."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing import queues
from pathlib import Path

from sd3.common.command_line import UserError

PLACE = Path("/dev/shm")
DEATH = "DataLoader worker"  # is in what torch raises where a loader process has died


def free() -> int | None:
    """Bytes that are free in /dev/shm, None where it is not there."""
    try:
        found = os.statvfs(PLACE)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


def state() -> str:
    """How /dev/shm stands, for a message."""
    room = free()
    return f"{PLACE} is not there" if room is None else f"{PLACE} has {room / 1e6:.1f} MB free"


def no_loaders(workers: int, reason: object) -> UserError:
    """The refusal where loader processes cannot be started, or cannot go on."""
    first = next(iter(str(reason).splitlines()), "")
    return UserError(
        f"--dataloader_num_workers={workers}: {first} ({state()}; TMPDIR is {os.environ.get('TMPDIR', 'not set')}); "
        "make room there, or give --dataloader_num_workers=0.", 1,
    )  # fmt: skip


def check(workers: int) -> None:
    """Raise UserError where no semaphore can be made, of which each queue of a loader process has some."""
    try:
        multiprocessing.get_context("fork").Semaphore()
    except OSError as error:
        raise no_loaders(workers, f"loader processes need semaphores: {error.strerror}") from None


def end_where_a_batch_is_lost(workers: int) -> None:
    """Have a process end that cannot put something into a queue, and those forked from it.

    Python shows the stack and goes on without what was lost, and who waits for it does so for ever. The hook that is
    replaced is called in the thread that feeds the queue.
    """

    def end(error: Exception, _lost: object) -> None:
        os.write(2, f"{no_loaders(workers, f'a batch cannot be handed over: {error}')}\n".encode())
        os._exit(1)

    queues.Queue._on_queue_feeder_error = staticmethod(end)  # type: ignore[method-assign]
