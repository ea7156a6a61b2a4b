"""Runs a training command to its end: output to terminal and log, signals to the ranks, nobody left behind.

    python -m sd3.common.supervise --log FILE [--grace SECONDS] [--parent PID] -- COMMAND...

`accelerate launch` does not do this itself: with one process it dies of SIGTERM and orphans its child; with several it
kills the ranks 30 s after the signal, or as soon as the first of them has ended, in the middle of a checkpoint if need
be. So the ranks are signalled here, while accelerate's own process is held still (SIGSTOP), and get the whole grace;
also where a scheduler has signalled every process, and accelerate's has died of it. A rank that refuses its input is
heard past accelerate, see refusals.py. Linux in full; elsewhere the command's process group is signalled as one.

Where this process is killed itself, accelerate's dies with it, and the ranks stop by themselves, see orphans.py. Where
the launcher is killed that started it, the ranks are stopped as by SIGTERM.
"""

from __future__ import annotations

import argparse
import contextlib
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

from sd3.common import orphans
from sd3.common.command_line import UserError
from sd3.common.refusals import Refusals
from sd3.common.scratch import Scratch

LINUX = sys.platform.startswith("linux")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SECRETS = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "WANDB_API_KEY", "MODELSCOPE_API_TOKEN",
)  # fmt: skip
PR_SET_CHILD_SUBREAPER = 36
DOUBLE = 0.5  # s in which a signal is the first one again: a terminal sends Ctrl-C here and, by the launcher, once more
SETTLE = 3.0  # s from one rank's refusal in which the others may refuse too, before they are ended


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
    dead = set()
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        if fields:
            # One that ended while this loop ran may still be named as a parent.
            parents[int(entry.parent.name)] = int(fields[1])
            if fields[0] in "ZX":
                dead.add(int(entry.parent.name))
    found: dict[int, int] = {}
    for pid in parents:
        ancestor = parents.get(pid)
        while ancestor is not None and ancestor != root:
            ancestor = parents.get(ancestor)
        if ancestor == root and pid not in dead:
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

    def __init__(self, command: list[str], log: Path, grace: float, parent: int = 0) -> None:
        """Starts the command; `grace` in seconds; `parent`: the process without which it is to stop, 0 for none.

        Raises:
            OSError: the log cannot be opened, or the command cannot be started.
            UserError: there is no place for temporary files.
        """
        self.grace = grace
        self.parent = parent
        self.caught = 0
        self.deadline = 0.0
        self.child: subprocess.Popen[bytes] | None = None
        self.passed_on = self.held = False
        # Before the command is there, which would else inherit what this process was told to ignore: SIGINT, by a shell
        # that starts it in the background.
        for number in SIGNALS:
            # A SIGHUP that is ignored is nohup's doing.
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self.on_signal)
        if LINUX:
            ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self.log = log.open("ab", buffering=0)
        self.log_fails = False
        values = [os.environ.get(name, "").encode() for name in SECRETS]
        self.masker = Masker([value for value in values if len(value) >= 8])
        self.lines = LogLines()
        if sys.stdout.isatty():
            self.source, writer = pty.openpty()
            size = fcntl.ioctl(sys.stdout.fileno(), termios.TIOCGWINSZ, bytes(8))
            fcntl.ioctl(writer, termios.TIOCSWINSZ, size)
        else:
            self.source, writer = os.pipe()
        self.scratch = Scratch()
        self.refusals = Refusals(self.scratch.folder)
        if self.scratch.note:
            self.show(f"{self.scratch.note}\n".encode())
        try:
            self.child = self.start(command, writer)
        except BaseException:
            self.clean_up()
            raise
        os.close(writer)
        if self.caught:
            self.pass_on()

    def start(self, command: list[str], output: int) -> subprocess.Popen[bytes]:
        """Start the command, which dies with this process; its ranks learn whom to watch."""
        own = os.getpid()
        added = {**self.refusals.environment, **self.scratch.environment, **orphans.supervised_by(self.grace)}
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            env={**os.environ, **added}, preexec_fn=lambda: orphans.die_with(own),
        )  # fmt: skip

    def clean_up(self) -> None:
        """Remove what the run needed only while it went on."""
        self.refusals.close()
        self.scratch.remove()

    def on_signal(self, number: int, _frame: FrameType | None = None) -> None:
        """First signal: pass it to the ranks, which may save what they have. A second one: end them at once."""
        now = time.monotonic()
        if self.caught:
            if now > self.deadline - self.grace + DOUBLE:
                self.deadline = now
            return
        # A terminal that was closed is a reason to stop like any other, and SIGTERM is what all programs know.
        self.caught = signal.SIGTERM if number == signal.SIGHUP else number
        self.deadline = now + self.grace
        self.pass_on()

    def pass_on(self) -> None:
        """Give the signal to the ranks, once; to the command itself where it has none."""
        if self.child is None or self.passed_on:
            return
        self.passed_on = True
        if not LINUX:
            self.signal_group(self.caught)
            return
        if ranks := self.ranks():
            self.hold()
        for pid in ranks or self.left():
            send(pid, self.caught)

    def ranks(self) -> set[int]:
        """The command's own children, wherever its end has left them."""
        assert self.child is not None
        homes = (self.child.pid, os.getpid())
        return {pid for pid, parent in descendants(os.getpid()).items() if parent in homes} - {self.child.pid}

    def hold(self) -> None:
        """Keep the command from ending its ranks in its own way."""
        assert self.child is not None
        if self.child.pid in descendants(os.getpid()):
            self.held = True
            send(self.child.pid, signal.SIGSTOP)

    def left(self) -> set[int]:
        """The processes whose end is to be waited for."""
        assert self.child is not None
        return set(descendants(os.getpid())) - ({self.child.pid} if self.held else set())

    def pump(self, seconds: float) -> bool:
        """Pass on what the command wrote within `seconds`, and hear ranks that refuse; False when no more will come."""
        server = [] if self.refusals.server is None else [self.refusals.server]
        ready, _, _ = select.select([self.source, *server], [], [], seconds)
        if set(server) & set(ready):
            self.hear()
        if self.source not in ready:
            return True
        try:
            data = os.read(self.source, 65536)
        except OSError:  # the other end of a pty is closed
            data = b""
        self.show(self.masker.feed(data, last=not data))
        return bool(data)

    def hear(self) -> None:
        """A rank refuses: the command, which would report that in its own way, is held."""
        assert self.child is not None
        self.refusals.take()
        if self.refusals.pids and not self.held and self.child.pid not in self.refusals.pids:
            self.hold()
        if self.refusals.pids and not self.deadline:
            self.deadline = time.monotonic() + self.grace

    def settle(self) -> None:
        """Let the ranks that refused end once all have, or once the others had time to; those are then ended."""
        if not self.refusals.waiting:
            return
        others = self.ranks() - self.refusals.pids
        if others and time.monotonic() < (self.deadline if self.caught else self.refusals.began + SETTLE):
            return
        for pid in others:
            send(pid, signal.SIGKILL)
        self.refusals.release()

    def show(self, data: bytes) -> None:
        """Write to terminal and log; neither a terminal that went away nor a full disk ends the training."""
        try:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        except OSError:
            pass
        self.write_log(self.lines.feed(data))

    def write_log(self, data: bytes) -> None:
        """Write to the log, and say once where that fails."""
        try:
            while data:
                data = data[self.log.write(data) :]
        except OSError as error:
            if not self.log_fails:
                self.log_fails = True
                text = f"{self.log.name} cannot be written ({error.strerror}); the run goes on, but lines are lost."
                with contextlib.suppress(OSError):
                    print(text, file=sys.stderr, flush=True)

    def run(self) -> int:
        """Supervise to the end; returns the exit status. Whatever happens here, no process is left behind."""
        try:
            return self.see_to_the_end()
        finally:
            self.end_all()
            self.clean_up()

    def see_to_the_end(self) -> int:
        """As `run`, if nothing goes wrong."""
        assert self.child is not None
        open_end = True
        while self.goes_on():
            if open_end:
                open_end = self.pump(0.2)
            else:
                time.sleep(0.1)
        self.end_all()
        while open_end and self.pump(0.5) and select.select([self.source], [], [], 0)[0]:
            pass
        self.show(self.masker.feed(b"", last=True))
        for sentence in self.refusals.sentences:
            self.show(self.masker.feed(f"{sentence}\n".encode(), last=True))
        self.write_log(self.lines.rest())
        with contextlib.suppress(OSError):
            os.fsync(self.log.fileno())
        if self.caught:
            return 128 + self.caught
        if self.refusals.sentences:
            return self.refusals.status
        code = self.child.returncode
        return 128 - code if code < 0 else code

    def goes_on(self) -> bool:
        """Is there anything to wait for? The command; after a signal or a refusal its ranks, for their time."""
        assert self.child is not None
        code = self.child.poll()
        if self.parent and os.getppid() != self.parent and not self.caught:
            self.on_signal(signal.SIGTERM)
        if code is not None and -code in SIGNALS and not self.caught:
            self.on_signal(-code)  # it reached all processes, and this one last
        self.settle()
        if not self.caught and not self.refusals.pids:
            return code is None
        return time.monotonic() < self.deadline and (bool(self.left()) if LINUX else code is None)

    @staticmethod
    def reap() -> None:
        """Collect orphans that came to this process when their parent died."""
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass

    def signal_group(self, number: int) -> None:
        """Signal the command's process group, which may be gone."""
        assert self.child is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.child.pid, number)

    def end_all(self) -> None:
        """No process of the command outlives this call, whoever its parent is now."""
        assert self.child is not None
        for _ in range(50):
            left = descendants(os.getpid())
            for pid in left:
                send(pid, signal.SIGKILL)
            if not LINUX:
                self.signal_group(signal.SIGKILL)
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
    parser.add_argument("--parent", type=int, default=0, help="process whose end ends the run: the launcher")
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
        supervisor = Supervisor(command, options.log, grace, options.parent)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.status
    except OSError as error:
        print(f"{command[0]} cannot be run with its log at {options.log}: {error.strerror}.", file=sys.stderr)
        return 3
    return supervisor.run()


if __name__ == "__main__":
    sys.exit(main())
