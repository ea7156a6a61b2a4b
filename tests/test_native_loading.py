"""Processes that load data: where they cannot work, or die, a run does without what is missing, or says so and ends."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import native_runs
from launching import PROJECT
from sd3.common import shared_memory
from sd3.common.command_line import UserError
from sd3.common.scratch import SCRATCH_LOCK
from sd3.common.supervise import descendants
from sd3.native import loading
from sd3.native.loading import Loaded, Packed, Refusal, WorkerDeaths, refused

RANK = PROJECT / "sd3" / "launch" / "rank.py"


def run(model: Path, data: Path, output: Path, before: Callable[[], None], workers: int, steps: int = 6) -> int:
    """Status of a run whose processes load data; a caption each, so that their embeds are handed over too."""
    flags = ["--seed=3", "--train_batch_size=1", f"--max_train_steps={steps}", f"--dataloader_num_workers={workers}"]
    process = native_runs.forked("lora", output, model, [f"--instance_data_dir={data}"], *flags, before=before)
    return native_runs.finished(process, 60)


class Told:
    """Has each batch that is packed told to the log, after `before`."""

    def __init__(self, before: Callable[[], None]) -> None:
        self.before = before

    def __call__(self) -> None:
        self.before()
        plain = Packed.__init__

        def init(packed: Packed, *rest: object) -> None:
            plain(packed, *rest)
            os.write(2, b"packed\n")

        Packed.__init__ = init


class LongTmpdir:
    """Sets a TMPDIR below which no socket can be; with `given` as if a supervisor had made it."""

    def __init__(self, folder: Path, given: bool) -> None:
        self.folder, self.given = folder, given

    def __call__(self) -> None:
        self.folder.mkdir()
        os.environ["TMPDIR"] = str(self.folder)
        if self.given:
            os.environ[SCRATCH_LOCK] = str(self.folder / "none")
        tempfile.tempdir = None


def no_room() -> None:
    """Leaves no room in shared memory for a batch."""

    def share(tensor: torch.Tensor) -> None:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    torch.Tensor.share_memory_ = share


def little_room() -> None:
    """Has shared memory for less than all processes may write at once, which torch would die of."""

    def share(tensor: torch.Tensor) -> None:
        raise AssertionError("a batch was put where there is no room")

    shared_memory.free = lambda: 20_000
    torch.Tensor.share_memory_ = share


@pytest.mark.parametrize("harm", ["nothing", "TMPDIR", "the supervisor's TMPDIR", "no room", "little room"])
def test_batches_arrive_whatever_forbids_shared_memory(
    tiny_model: Path, dog_dir: Path, tmp_path: Path, harm: str
) -> None:
    """`AF_UNIX path too long` and a full /dev/shm were raised in a thread of the loader process, and the run hung."""
    folder, output = tmp_path / ("x" * 120), tmp_path / "run"
    before = {
        "nothing": lambda: None, "TMPDIR": LongTmpdir(folder, False),
        "the supervisor's TMPDIR": LongTmpdir(folder, True), "no room": no_room, "little room": little_room,
    }[harm]  # fmt: skip
    assert run(tiny_model, dog_dir, output, Told(before), 2) == 0, native_runs.log_of(output).read_text()
    packed = harm in ("the supervisor's TMPDIR", "no room", "little room")
    assert ("packed\n" in native_runs.log_of(output).read_text()) == packed
    assert harm != "TMPDIR" or list(folder.iterdir()) == []


def no_semaphores() -> None:
    """As with a full /dev/shm, which only an administrator could fill for a test."""
    from multiprocessing import synchronize

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    synchronize._multiprocessing = SimpleNamespace(SemLock=fail)


def test_a_full_shared_memory_is_named(tiny_model: Path, dog_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert run(tiny_model, dog_dir, output, no_semaphores, 2) == 1
    log = native_runs.log_of(output).read_text()
    assert "--dataloader_num_workers=2: loader processes need semaphores: No space left on device (/dev/shm " in log
    assert "give --dataloader_num_workers=0" in log and "Traceback" not in log
    assert run(tiny_model, dog_dir, output, no_semaphores, 0) == 0


def killed_loader() -> None:
    """Has a loader process killed, as for want of memory, in the second step."""
    from sd3.native import step

    true_loss, calls = step.FlowMatching.loss, iter(range(1, 1000))

    def loss(*positional):
        if next(calls) == 2:
            os.kill(min(descendants(os.getpid())), signal.SIGKILL)
        return true_loss(*positional)

    step.FlowMatching.loss = loss


def test_a_loader_process_that_died_ends_the_run_with_a_sentence(
    tiny_model: Path, dog_dir: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    assert run(tiny_model, dog_dir, output, killed_loader, 2, steps=100) == 1
    log = native_runs.log_of(output).read_text()
    assert "--dataloader_num_workers=2: a loader process has died: DataLoader worker (pid" in log
    assert "killed by signal: Killed" in log and "Traceback" not in log


class CacheGone:
    """Has the cache removed when the first step begins, and nothing kept of it in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self) -> None:
        import shutil

        from sd3.native import cache, loop

        cache.KEPT_BYTES = 0
        plain = loop.Loader.batches

        def batches(loader: loop.Loader, *rest: int):
            loader.samples.cache._room = 0
            loader.samples.cache._kept.clear()
            shutil.rmtree(self.folder)
            return plain(loader, *rest)

        loop.Loader.batches = batches


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cache_that_went_away_is_a_sentence(tiny_model: Path, dog_dir: Path, tmp_path: Path, workers: int) -> None:
    output = tmp_path / "run"
    assert run(tiny_model, dog_dir, output, CacheGone(tmp_path / "precomputed"), workers) == 1
    log = native_runs.log_of(output).read_text()
    assert f"--precompute_dir={tmp_path / 'precomputed'} cannot be read (" in log and "Traceback" not in log


class Numbers(Dataset):
    def __getitem__(self, number: int) -> tuple[int, int]:
        return number, os.getpid()


def test_a_death_is_raised_where_batches_are_waited_for_and_nowhere_else() -> None:
    """In the middle of a checkpoint it would be taken for a full disk."""
    before = signal.getsignal(signal.SIGCHLD)
    try:
        for _ in range(2):  # the second loader of a process too
            batches = iter(DataLoader(Numbers(), batch_sampler=[[n] for n in range(100)], num_workers=2))
            deaths = WorkerDeaths()
            with deaths.raised():
                _, (pid,) = next(batches)
            os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.5)  # the writing of a checkpoint
            with pytest.raises(RuntimeError, match=shared_memory.DEATH), deaths.raised():
                raise AssertionError("the death was not noticed")
            del batches
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_a_batch_arrives_as_it_was_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [torch.randn(2, 5, 3).bfloat16(), torch.arange(6).view(2, 3)]
    batch = Loaded([4, 7], torch.randn(2, 16, 4, 4), torch.randn(2, 16, 4, 4), texts, torch.tensor([1, 0]))
    asked = []

    def pin_memory(tensor: torch.Tensor, *place: str) -> torch.Tensor:
        asked.append(place)
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    packed = Packed(batch, "npu")
    for found in (packed.unpacked(), packed.pin_memory(), Packed(batch, "cuda").pin_memory()):
        assert found.positions == [4, 7]
        for one, other in zip((*found[1:3], found.rows, *found.texts), (*batch[1:3], batch.rows, *texts), strict=True):
            assert one.dtype == other.dtype and torch.equal(one, other)
    assert set(asked) == {("npu",), ()}


def test_a_refusal_keeps_its_status() -> None:
    def refuse() -> None:
        raise UserError("no", 3)

    assert refused(SimpleNamespace(folder="cache"), refuse) == Refusal("no", 3)
    assert loading.refused(SimpleNamespace(folder="cache"), lambda: 5) == 5


def test_the_sentence_says_how_shared_memory_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "/dev/shm has " in str(shared_memory.no_loaders(2, "x"))
    monkeypatch.setattr(shared_memory, "PLACE", Path("/dev/none"))
    assert "(/dev/none is not there; TMPDIR is " in str(shared_memory.no_loaders(2, "x"))


def as_rank(script: Path, *arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """A patched script as the launchers run it, here one of a test."""
    program = f"{before}\nimport runpy, sys\nsys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", program, str(RANK), str(script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_patched_script_runs_as_it_would_alone(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import json, sys\nprint(json.dumps([__name__, sys.argv, sys.path[0]]))\nsys.exit(7)")
    ended = as_rank(script, "--a=b", "c")
    assert ended.returncode == 7, ended.stderr
    assert ended.stdout == f'["__main__", ["{script}", "--a=b", "c"], "{tmp_path}"]\n'


STUCK = """
import multiprocessing, os

class Batch:
    def __reduce__(self):
        raise OSError("AF_UNIX path too long")

def load(queue):
    queue.put(Batch())
    queue.close()
    queue.join_thread()

queue = multiprocessing.get_context("fork").Queue()
loader = multiprocessing.get_context("fork").Process(target=load, args=(queue,))
loader.start()
loader.join(30)
raise SystemExit(f"the loader process ended with {loader.exitcode}")
"""


def test_a_loader_process_of_a_patched_script_ends_rather_than_lose_a_batch(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(STUCK)
    ended = as_rank(script, "--dataloader_num_workers=2")
    assert "the loader process ended with 1" in ended.stderr and "Traceback" not in ended.stderr
    assert "--dataloader_num_workers=2: a batch cannot be handed over: AF_UNIX path too long (/dev/shm " in ended.stderr


def test_a_loader_process_of_a_patched_script_that_died_is_a_sentence(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("raise RuntimeError('DataLoader worker (pid(s) 5) exited unexpectedly')")
    ended = as_rank(script, "--dataloader_num_workers=2")
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1
    assert "a loader process has died: DataLoader worker (pid(s) 5) exited unexpectedly (/dev/shm " in ended.stderr
    script.write_text("raise RuntimeError('another')")
    assert "Traceback" in as_rank(script, "--dataloader_num_workers=2").stderr


@pytest.mark.parametrize("flags", [["--dataloader_num_workers=1"], ["--dataloader_num_workers", "3"]])
def test_a_patched_script_is_not_begun_without_semaphores(tmp_path: Path, flags: list[str]) -> None:
    script = tmp_path / "script.py"
    script.write_text("print('begun')")
    full = "from multiprocessing import synchronize\ndef fail(*_):\n    raise OSError(28, 'No space left on device')\n"
    full += "synchronize._multiprocessing = type('Full', (), {'SemLock': staticmethod(fail)})"
    ended = as_rank(script, *flags, before=full)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.count("\n") == 1 and "loader processes need semaphores: No space left on device" in ended.stderr
    assert as_rank(script, "--dataloader_num_workers=0", before=full).stdout == "begun\n"


def test_no_loader_process_is_left_by_a_test() -> None:
    assert not multiprocessing.active_children()
