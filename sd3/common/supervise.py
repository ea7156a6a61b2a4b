"""Runs a training command to its end: output to terminal and log, signals to the ranks, nobody left behind.

    python -m sd3.common.supervise --log FILE [--grace SECONDS] -- COMMAND...

`accelerate launch` does not do this itself: with one process it dies of SIGTERM and orphans its child; with several it
kills the ranks 30 s after the signal, or as soon as the first of them has ended, in the middle of a checkpoint if need
be. So the ranks are signalled here, while accelerate's own process is held still (SIGSTOP), and get the whole grace.
Linux in full; elsewhere the command's process group is signalled as one.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import FrameType

SECRETS = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "WANDB_API_KEY", "MODELSCOPE_API_TOKEN",
)  # fmt: skip
PR_SET_CHILD_SUBREAPER = 36
DOUBLE = 0.5  # s in which a signal is the first one again: a terminal sends Ctrl-C here and, by the launcher, once more


class Masker:
    """Replaces secrets in a stream of bytes, also where one is cut in two between reads."""

    def __init__(self, secrets: list[bytes]) -> None:
        """`secrets`: the byte strings to hide."""
        self.secrets = sorted(secrets, key=len, reverse=True)
        self.held = b""

    def feed(self, data: bytes, last: bool = False) -> bytes:
        """What may be shown of everything fed so far and not yet returned."""
        data = self.held + data
        for secret in self.secrets:
            data = data.replace(secret, b"***")
        keep = 0
        if not last:
            for secret in self.secrets:
                for length in range(min(len(secret) - 1, len(data)), keep, -1):
                    if data.endswith(secret[:length]):
                        keep = length
                        break
        self.held = data[len(data) - keep :]
        return data[: len(data) - keep]


class LogLines:
    """Turns what a terminal is sent into lines: each redraw after a carriage return becomes a line of its own."""

    def __init__(self) -> None:
        """Starts at the beginning of a line."""
        self.pending = b""

    def feed(self, data: bytes) -> bytes:
        """Whole lines in the data so far."""
        data = (self.pending + data).replace(b"\r\n", b"\n")
        # A lone \r at the end may be the first half of \r\n.
        cut = len(data) - 1 if data.endswith(b"\r") else len(data)
        data, self.pending = data[:cut].replace(b"\r", b"\n"), data[cut:]
        end = data.rfind(b"\n") + 1
        self.pending = data[end:] + self.pending
        return b"".join(line + b"\n" for line in data[:end].split(b"\n")[:-1] if line.strip())

    def rest(self) -> bytes:
        """The unfinished last line, ended."""
        return self.pending.strip(b"\r\n") + b"\n" if self.pending.strip() else b""


def descendants(root: int) -> dict[int, int]:
    """Live processes below `root` as {pid: parent}; empty where there is no /proc."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        if fields and fields[0] != "Z":
            parents[int(entry.parent.name)] = int(fields[1])
    found: dict[int, int] = {}
    for pid in parents:
        ancestor = parents.get(pid)
        while ancestor is not None and ancestor != root:
            ancestor = parents.get(ancestor)
        if ancestor == root:
            found[pid] = parents[pid]
    return found


def send(pid: int, number: int) -> None:
    """Signal a process that may be gone already."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


class Supervisor:
    """One command, its output and its end."""

    def __init__(self, command: list[str], log: Path, grace: float) -> None:
        """Starts the command; `grace` in seconds."""
        self.grace = grace
        self.caught = 0
        self.deadline = 0.0
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self.on_signal)
        if sys.platform.startswith("linux"):
            ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self.log = log.open("ab", buffering=0)
        values = [os.environ.get(name, "").encode() for name in SECRETS]
        self.masker = Masker([value for value in values if len(value) >= 8])
        self.lines = LogLines()
        if sys.stdout.isatty():
            self.source, writer = pty.openpty()
            size = fcntl.ioctl(sys.stdout.fileno(), termios.TIOCGWINSZ, bytes(8))
            fcntl.ioctl(writer, termios.TIOCSWINSZ, size)
        else:
            self.source, writer = os.pipe()
        self.child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=writer, stderr=writer, start_new_session=True
        )
        os.close(writer)

    def on_signal(self, number: int, _frame: FrameType | None) -> None:
        """First signal: pass it to the ranks, which may save what they have. A second one: end them at once."""
        now = time.monotonic()
        if self.caught:
            if now > self.deadline - self.grace + DOUBLE:
                self.deadline = now
            return
        self.caught = number
        self.deadline = now + self.grace
        below = descendants(self.child.pid)
        ranks = [pid for pid, parent in below.items() if parent == self.child.pid]
        if not ranks:
            send(self.child.pid, number)
            return
        send(self.child.pid, signal.SIGSTOP)
        for pid in ranks:
            send(pid, number)

    def pump(self, seconds: float) -> bool:
        """Pass on what the command wrote within `seconds`; False when nothing more will come."""
        ready, _, _ = select.select([self.source], [], [], seconds)
        if not ready:
            return True
        try:
            data = os.read(self.source, 65536)
        except OSError:  # the other end of a pty is closed
            data = b""
        self.show(self.masker.feed(data, last=not data))
        return bool(data)

    def show(self, data: bytes) -> None:
        """Write to terminal and log; a terminal that went away does not end the training."""
        try:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        except OSError:
            pass
        self.log.write(self.lines.feed(data))

    def run(self) -> int:
        """Supervise to the end; returns the exit status."""
        open_end = True
        while self.child.poll() is None:
            if open_end:
                open_end = self.pump(0.2)
            else:
                time.sleep(0.1)
            if self.caught:
                ranks = descendants(self.child.pid)
                if time.monotonic() >= self.deadline or not ranks:
                    self.end_all()
        self.end_all()
        while open_end and self.pump(0.5) and select.select([self.source], [], [], 0)[0]:
            pass
        self.show(self.masker.feed(b"", last=True))
        self.log.write(self.lines.rest())
        os.fsync(self.log.fileno())
        if self.caught:
            return 128 + self.caught
        code = self.child.returncode
        return 128 - code if code < 0 else code

    @staticmethod
    def reap() -> None:
        """Collect orphans that came to this process when their parent died."""
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass

    def end_all(self) -> None:
        """No process of the command outlives this call, whoever its parent is now."""
        for _ in range(50):
            left = [pid for pid in descendants(os.getpid()) if pid != os.getpid()]
            for pid in left:
                send(pid, signal.SIGKILL)
            if not sys.platform.startswith("linux"):
                try:
                    os.killpg(self.child.pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            if self.child.poll() is not None:
                self.reap()
            if not left:
                return
            time.sleep(0.05)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Run a training command and see it to its end.")
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--grace", default="60", help="seconds from a signal to SIGKILL")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    try:
        grace = float(options.grace)
        if not 0 <= grace <= 86400:
            raise ValueError
    except ValueError:
        print(f"SD3_STOP_GRACE={options.grace} is no number of seconds from 0 to 86400.", file=sys.stderr)
        return 2
    if not command:
        parser.error("a command is needed after --")
    try:
        return Supervisor(command, options.log, grace).run()
    except OSError as error:
        print(f"{command[0]} cannot be run with its log at {options.log}: {error.strerror}.", file=sys.stderr)
        return 3


if __name__ == "__main__":
    sys.exit(main())
