"""No process outlives those that see to its end, even where they are killed: by the kernel for want of memory, say.

A rank watches the supervisor, two generations above it; a process that loads data dies with its rank. Standard library
only.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import signal
import sys
import threading
import time
from pathlib import Path

LINUX = sys.platform.startswith("linux")
SUPERVISOR = "SD3_SUPERVISOR_PROCESS"  # the environment variable that names it: process id, its start, the grace in s
SCRATCH_LOCK = "SD3_SCRATCH_LOCK"  # the environment variable that names the file that keeps the temporary directory
PR_SET_PDEATHSIG = 1
INTERVAL = 0.5  # s between looks at another process
HELD: list[object] = []  # locks, for as long as this process lives


def started(pid: int) -> str:
    """When a process began, in the kernel's ticks; empty where it has ended, `?` where there is no /proc."""
    if not LINUX:
        with contextlib.suppress(PermissionError):
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                return ""
        return "?"
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def die_with(parent: int, number: int = signal.SIGKILL) -> None:
    """Have this process signalled when `parent`, which started it by its main thread, has ended; now, if it has.

    By the kernel on Linux, whatever this process is doing, and for what it executes too.
    """
    if LINUX:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)
    else:
        threading.Thread(target=_poll_parent, args=(parent, number), daemon=True).start()
    if os.getppid() != parent:  # before the call
        os.kill(os.getpid(), number)


def _poll_parent(parent: int, number: int) -> None:
    while os.getppid() == parent:
        time.sleep(INTERVAL)
    os.kill(os.getpid(), number)


def forks_die_with_this() -> None:
    """Have every process that the main thread forks from here on die with this one; not those it executes."""
    forking: list[int] = []

    def before() -> None:
        # The kernel acts on the end of the thread that forked, and only the main one lasts.
        forking[:] = [os.getpid()] if threading.current_thread() is threading.main_thread() else []

    def in_child() -> None:
        if forking:
            die_with(forking[0])

    os.register_at_fork(before=before, after_in_child=in_child)


def supervised_by(grace: float) -> dict[str, str]:
    """What tells the ranks below this process, the supervisor, to watch it."""
    return {SUPERVISOR: f"{os.getpid()} {started(os.getpid())} {grace}"}


def stop_without_supervisor() -> None:
    """Have this rank stopped when its supervisor, if it has one, is gone: by SIGTERM, after the grace by SIGKILL."""
    try:
        pid, since, grace = os.environ[SUPERVISOR].split(" ")
        watched = (int(pid), since, float(grace))
    except (KeyError, ValueError):
        return
    _share_lock()
    threading.Thread(target=_watch, args=watched, name="supervisor", daemon=True).start()


def _share_lock() -> None:
    """Keep the next run from sweeping the temporary directory for as long as this rank lives."""
    with contextlib.suppress(OSError, KeyError):
        lock = open(os.environ[SCRATCH_LOCK], "rb")  # noqa: SIM115
        HELD.append(lock)
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)


def _wait_for_end(pid: int, since: str) -> None:
    """Return when the process `pid` that began at `since` has ended; at once, where the kernel tells it."""
    with contextlib.suppress(OSError, AttributeError):
        ended = select.poll()
        ended.register(os.pidfd_open(pid), select.POLLIN)
        if started(pid) == since:
            ended.poll()
    while started(pid) == since:
        time.sleep(INTERVAL)


def _watch(pid: int, since: str, grace: float) -> None:
    _wait_for_end(pid, since)
    # The pipe to the supervisor is broken: what is written to it from here on would end the rank half-way.
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):
            os.dup2(nowhere, descriptor)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace)
    os.kill(os.getpid(), signal.SIGKILL)
