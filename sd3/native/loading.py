"""Between a rank and the processes that load its batches: what is handed over, and what is reported of failures."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing.reduction import DupFd
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch.utils.data import Dataset

from sd3.common import orphans, shared_memory
from sd3.common.command_line import UserError
from sd3.native.cache import Cache
from sd3.native.stop import SIGNALS

T = TypeVar("T")
PAGE = 4096  # bytes to which shared memory is rounded up


class Refusal(NamedTuple):
    """What keeps a batch from being loaded; an error that left a loader process would come with its stack."""

    text: str
    status: int


class Loaded(NamedTuple):
    """A batch as it is collated: T positions, B rows."""

    positions: list[int]
    mean: torch.Tensor  # [B, 16, h, w]
    logvar: torch.Tensor  # [B, 16, h, w]
    texts: list[torch.Tensor]  # what the model is given for each distinct caption; none where the captions are few
    rows: torch.Tensor  # [B] which of them each row has, or which of the data set's


class Packed:
    """A batch on its way from a loader process as bytes: slower than in shared memory, and in need of none."""

    def __init__(self, batch: Loaded, device: str) -> None:
        """`device`: type of the device for which to pin the memory on arrival."""
        tensors = {"mean": batch.mean, "logvar": batch.logvar, "rows": batch.rows}
        self.data = save({**tensors, **{f"text {index}": text for index, text in enumerate(batch.texts)}})
        self.positions, self.device = batch.positions, device

    def unpacked(self) -> Loaded:
        """The batch."""
        tensors = load(self.data)
        texts = [tensors[f"text {index}"] for index in range(len(tensors) - 3)]
        return Loaded(self.positions, tensors["mean"], tensors["logvar"], texts, tensors["rows"])

    def pin_memory(self) -> Loaded:
        """The batch in pinned memory, from which a device fetches it while it computes; a DataLoader calls this."""
        place = ("npu",) if self.device == "npu" else ()  # CUDA needs no naming
        positions, mean, logvar, texts, rows = self.unpacked()
        mean, logvar, rows, *texts = (tensor.pin_memory(*place) for tensor in (mean, logvar, rows, *texts))
        return Loaded(positions, mean, logvar, texts, rows)


def begin_loading(parent: int, workers: int, _worker: int) -> None:
    """Set up one of the loader processes of the rank `parent`, whose end is its own.

    It ignores signals: the rank acts on them, and needs its batches to end the step.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    shared_memory.end_where_a_batch_is_lost(workers)
    orphans.die_with(parent)


def handed_over(batch: Loaded, device: str, workers: int) -> Loaded | Packed:
    """A batch for the rank: in shared memory, where there is room for it and the sockets by which its files travel.

    torch would find out only in the thread that feeds the queue, whose failures keep the rank waiting for ever, or die
    of a bus error, for it writes to memory that there is not.
    """
    tensors = (batch.mean, batch.logvar, batch.rows, *batch.texts)
    room = shared_memory.free()
    # The other processes may be about to do the same.
    if room is not None and room < (workers + 1) * sum(tensor.nbytes + PAGE for tensor in tensors):
        return Packed(batch, device)
    if not _descriptors_travel():
        return Packed(batch, device)
    try:
        for tensor in tensors:
            tensor.share_memory_()
    except (RuntimeError, OSError):
        return Packed(batch, device)
    return batch


@functools.cache
def _descriptors_travel() -> bool:
    """Can this process hand a file descriptor to another? A name of TMPDIR that is too long forbids it."""
    try:
        os.close(DupFd(0).detach())
    except (OSError, EOFError):
        return False
    return True


def readable(cache: Cache, work: Callable[[], T]) -> T:
    """What `work` returns; UserError where the cache cannot be read."""
    try:
        return work()
    except (OSError, SafetensorError) as error:
        reason = f"--precompute_dir={cache.folder} cannot be read ({error}); start again, what is missing is made anew."
        raise UserError(reason, 1) from None


def refused(cache: Cache, work: Callable[[], T]) -> T | Refusal:
    """As `readable`, with what it raises returned."""
    try:
        return readable(cache, work)
    except UserError as error:
        return Refusal(str(error), error.status)


class Shielded(Dataset):
    """A data set that returns refusals and raises none."""

    def __init__(self, samples: Any) -> None:  # noqa: ANN401
        """`samples`: with a `cache`, and by position what is loaded."""
        self.samples = samples

    def __getitem__(self, position: int) -> object:
        """The sample at a position, or a Refusal."""
        return refused(self.samples.cache, lambda: self.samples[position])


class WorkerDeaths:
    """Has torch raise for a loader process that died only where its batches are waited for.

    torch raises from the handler of SIGCHLD, wherever the main thread is: in the writing of a checkpoint, say, which
    would then be taken for a failure of the disk. Make this when the processes have been started.
    """

    def __init__(self) -> None:
        """Take over from torch's handler, which there is in a main thread that has started such processes."""
        self.waiting = False
        self.tell = signal.getsignal(signal.SIGCHLD)
        self.tell = getattr(self.tell, "torch", self.tell)
        if callable(self.tell) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, self._handler())

    def _handler(self) -> Callable[[int, Any], None]:
        def handle(number: int, frame: Any) -> None:  # noqa: ANN401
            if self.waiting:
                self.tell(number, frame)  # type: ignore[operator]

        handle.torch = self.tell  # type: ignore[attr-defined]  # for the next one's sake
        return handle

    @contextlib.contextmanager
    def raised(self) -> Iterator[None]:
        """Raise RuntimeError here for a process that has died or does so meanwhile."""
        self.waiting = True
        try:
            if callable(self.tell):
                self.tell(signal.SIGCHLD, None)
            yield
        finally:
            self.waiting = False
