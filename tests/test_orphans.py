"""Supervisor or launcher killed with -9: every process below ends, nothing stays locked, a resume works at once."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import native_runs
from sd3.common import orphans
from sd3.common.supervise import descendants
from test_supervise import LAUNCHER, PROJECT, ready, supervise_ranks, until

WATCH = "from sd3.common import orphans\norphans.stop_without_supervisor()\n"


def rank(folder: Path, name: str, at_sigterm: str) -> str:
    """A rank that watches its supervisor, with a loader process that ignores signals."""
    return f"""
import os, pathlib, signal, sys, time
{WATCH}
here = pathlib.Path({str(folder)!r})
orphans.forks_die_with_this()
if os.fork() == 0:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    time.sleep(600)
def stop(number, frame):
    print("a sentence to nobody", flush=True)
    {at_sigterm}
signal.signal(signal.SIGTERM, stop)
(here / "ready-{name}").touch()
while True:
    time.sleep(600)
"""


def gone(pids: set[int], seconds: float = 20) -> bool:
    """Have all these processes ended within the time?"""
    end = time.monotonic() + seconds
    while alive := {pid for pid in pids if orphans.started(pid)}:
        if time.monotonic() > end:
            for pid in alive:
                os.kill(pid, signal.SIGKILL)
            return False
        time.sleep(0.05)
    return True


SAVE = '(here / "saved-{name}").touch(); os._exit(143)'


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_save_what_they_have_when_their_supervisor_was_killed(tmp_path: Path, ranks: int) -> None:
    names = [str(number) for number in range(ranks)]
    programs = [rank(tmp_path, name, SAVE.format(name=name)) for name in names]
    process = supervise_ranks(tmp_path / "log", *programs, stdout=subprocess.DEVNULL)
    ready(tmp_path, ranks)
    below = set(descendants(process.pid))
    assert len(below) == 1 + 2 * ranks
    process.kill()
    assert gone(below)
    assert sorted(path.name for path in tmp_path.glob("saved-*")) == [f"saved-{name}" for name in names]


def test_a_rank_that_does_not_stop_is_killed_after_the_grace(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "sd3.common.supervise", f"--log={tmp_path / 'log'}", "--grace=1", "--"]
    process = subprocess.Popen([*line, sys.executable, "-c", LAUNCHER, rank(tmp_path, "0", "pass")], cwd=PROJECT)
    ready(tmp_path, 1)
    below = set(descendants(process.pid))
    process.kill()
    assert gone(below)


def test_a_supervisor_stops_when_its_launcher_was_killed(tmp_path: Path) -> None:
    supervisor = f'{sys.executable} -m sd3.common.supervise --log={tmp_path / "log"} --parent=$$ -- "$@" & wait'
    line = [sys.executable, "-c", LAUNCHER, rank(tmp_path, "0", SAVE.format(name="0"))]
    shell = subprocess.Popen(["bash", "-c", supervisor, "bash", *line], cwd=PROJECT, stdout=subprocess.DEVNULL)
    ready(tmp_path, 1)
    below = set(descendants(shell.pid))
    shell.kill()
    shell.wait()
    assert gone(below)
    assert (tmp_path / "saved-0").exists()
    assert "a sentence to nobody" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("parent", ["os.getppid() + 1", "1 + 2**22"])
def test_a_parent_that_ended_before_it_was_watched_is_not_waited_for(parent: str) -> None:
    program = f"import os, time; from sd3.common import orphans; orphans.die_with({parent}); time.sleep(60)"
    ended = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, timeout=30)
    assert ended.returncode == -signal.SIGKILL


def test_what_a_thread_forks_does_not_die_with_the_thread() -> None:
    program = f"""
import os, threading, time
{WATCH}
orphans.forks_die_with_this()
def work():
    if os.fork() == 0:
        time.sleep(1)
        os._exit(7)
thread = threading.Thread(target=work)
thread.start()
thread.join()
raise SystemExit(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    assert subprocess.run([sys.executable, "-c", program], cwd=PROJECT, timeout=30).returncode == 7


@pytest.mark.parametrize(
    "value",
    ["", "x", "1 2", "a b c", f"{os.getpid()} {orphans.started(os.getpid())} 60"],
    ids=["none", "one word", "two words", "three words", "this process"],  # the same in every process of the suite
)
def test_a_rank_whose_supervisor_is_well_or_unknown_goes_on(value: str) -> None:
    program = f"import time\n{WATCH}time.sleep(1)"
    env = {**os.environ, orphans.SUPERVISOR: value}
    assert subprocess.run([sys.executable, "-c", program], cwd=PROJECT, env=env, timeout=30).returncode == 0


def test_another_process_with_the_supervisors_number_is_not_taken_for_it() -> None:
    env = {**os.environ, orphans.SUPERVISOR: f"{os.getpid()} 1 60"}
    program = f"import time\n{WATCH}time.sleep(60)"
    ended = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, env=env, timeout=30)
    assert ended.returncode == -signal.SIGTERM


def watched_by(supervisor: int, output: int) -> Callable[[], None]:
    """Has a forked rank write to a pipe, and watch the process that reads from it."""

    def before() -> None:
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        os.close(output)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)
        os.environ[orphans.SUPERVISOR] = f"{supervisor} {orphans.started(supervisor)} 60"

    return before


def as_process(kind: str, line: list[str]) -> int:
    """As the script does it."""
    from sd3.native import loop

    sys.argv = ["script", *line]
    loop.train(kind)


def lock_is_free(output: Path) -> bool:
    with (output / ".training.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_native_run_ends_with_its_supervisor(
    ranks: int, workers: int, tiny_model: Path, dog_dir: Path, tmp_path: Path
) -> None:
    """A rank whose output is gone failed in showing that, and then waited for its loader processes, for ever."""
    output, log = tmp_path / "run", tmp_path / "log"
    run = ["lora", output, tiny_model, [f"--instance_data_dir={dog_dir}"], "--seed=3", "--train_batch_size=1"]
    endless = ["--max_train_steps=100000", "--checkpointing_steps=100000", f"--dataloader_num_workers={workers}"]
    reader, writer = os.pipe()
    with log.open("w") as shown:
        supervisor = subprocess.Popen(["cat"], stdin=reader, stdout=shown)
    os.close(reader)
    before = watched_by(supervisor.pid, writer)
    found = native_runs.forked_ranks(*run, *endless, ranks=ranks, before=before, entry=as_process)
    os.close(writer)
    until(lambda: "loss=" in log.read_text())

    def alive() -> set[int]:
        return {process.pid for process in found} | {pid for one in found for pid in descendants(one.pid)}

    until(lambda: len(alive()) == ranks * (1 + workers))  # a library may start a program for a moment
    processes = alive()
    supervisor.kill()
    supervisor.wait()
    assert [native_runs.finished(process, 60) for process in found] == [143] * ranks
    assert gone(processes, 5)
    until(lambda: lock_is_free(output))  # a thread of a process may end a moment after it
    (checkpoint,) = output.glob("checkpoint-*/complete")
    step = int(checkpoint.parent.name.split("-")[1])
    again = native_runs.forked(*run, f"--max_train_steps={step + 1}", "--resume_from_checkpoint=latest")
    assert native_runs.finished(again) == 0, native_runs.log_of(output).read_text()
