"""The supervisor's parts, and what it does for a terminal."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sd3.common import refusals
from sd3.common.command_line import UserError
from sd3.common.supervise import LogLines, Masker, descendants

PROJECT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("cuts", [[4], [1, 2, 3], [9, 10], list(range(1, 30)), []])
def test_a_secret_is_hidden_wherever_the_stream_is_cut(cuts: list[int]) -> None:
    data = b"before hf_secret123 after hf_sec"
    masker = Masker([b"hf_secret123"])
    edges = [0, *cuts, len(data)]
    shown = b"".join(masker.feed(data[a:b]) for a, b in zip(edges, edges[1:], strict=False))
    assert shown + masker.feed(b"", last=True) == b"before *** after hf_sec"


def test_output_that_is_no_secret_is_not_held_back() -> None:
    assert Masker([b"hf_secret123"]).feed(b"step 1\n") == b"step 1\n"


def test_redraws_become_lines() -> None:
    lines = LogLines()
    text = b"".join(lines.feed(part) for part in (b"\rSteps: 1", b"\rSteps: 2\r", b"\nnext\r\nlast"))
    assert text + lines.rest() == b"Steps: 1\nSteps: 2\nnext\nlast\n"


def supervise(log: Path, program: str, **keywords: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "sd3.common.supervise", "--log", str(log), "--", sys.executable, "-c", program],
        cwd=PROJECT, **keywords,
    )  # type: ignore[call-overload]  # fmt: skip


def test_a_terminal_keeps_its_bar_and_the_log_gets_lines(tmp_path: Path) -> None:
    leader, follower = pty.openpty()
    program = "import sys; print(sys.stdout.isatty()); sys.stdout.write('\\rbar 1\\rbar 2\\n')"
    process = supervise(tmp_path / "log", program, stdout=follower)
    os.close(follower)
    shown = b""
    while True:
        try:
            shown += os.read(leader, 4096)
        except OSError:
            break
    assert process.wait() == 0
    assert b"\rbar 1\rbar 2" in shown
    assert (tmp_path / "log").read_text() == "True\nbar 1\nbar 2\n"


def test_output_is_seen_before_the_end(tmp_path: Path) -> None:
    program = "import time; print('now', flush=True); time.sleep(600)"
    process = supervise(tmp_path / "log", program, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"now\n"
    process.terminate()
    assert process.wait() == 143


@pytest.mark.parametrize(
    ("program", "status"),
    [("raise SystemExit(7)", 7), ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 137), ("pass", 0)],
)
def test_the_status_is_the_commands(tmp_path: Path, program: str, status: int) -> None:
    assert supervise(tmp_path / "log", program).wait() == status


def test_an_orphan_does_not_outlive_the_command(tmp_path: Path) -> None:
    program = (
        "import subprocess, sys\n"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True)\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid))"
    )
    assert supervise(tmp_path / "log", program).wait() == 0
    pid = (tmp_path / "pid").read_text()
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("grace", ["soon", "-1", "nan"])
def test_a_bad_grace_is_refused(tmp_path: Path, grace: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "sd3.common.supervise", f"--log={tmp_path / 'log'}", f"--grace={grace}", "--", "true"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert f"SD3_STOP_GRACE={grace}" in result.stderr


LAUNCHER = """
import subprocess, sys
ranks = [subprocess.Popen([sys.executable, "-c", rank]) for rank in sys.argv[1:]]
try:
    failed = [rank.wait() for rank in ranks if rank.wait()]
except KeyboardInterrupt:
    sys.exit(1)
if failed:
    raise RuntimeError("the launcher's own trace")
"""  # as accelerate: no care for signals, status 1 and a trace whatever a rank ends with


def rank_that_saves(folder: Path, name: str) -> str:
    """A rank that ends with a file `saved-NAME`, two seconds after SIGTERM or SIGINT; it dies of any other signal."""
    return f"""
import pathlib, signal, sys, time
def stop(number, frame):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(2)
    pathlib.Path({str(folder)!r}, "saved-{name}").touch()
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
pathlib.Path({str(folder)!r}, "ready-{name}").touch()
time.sleep(60)
"""


def rank_that_refuses(sentence: str, status: int = 2, before: str = "") -> str:
    return f"""
import sys, time
from sd3.common.command_line import UserError
from sd3.common.refusals import refuse
{before}
sys.exit(refuse(UserError({sentence!r}, {status})))
"""


def supervise_ranks(log: Path, *ranks: str, **keywords: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "sd3.common.supervise", "--log", str(log), "--", sys.executable, "-c", LAUNCHER, *ranks],
        cwd=PROJECT, **keywords,
    )  # type: ignore[call-overload]  # fmt: skip


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def ready(folder: Path, ranks: int) -> None:
    until(lambda: len(list(folder.glob("ready-*"))) == ranks)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("first", ["supervisor", "launcher"])
def test_a_signal_to_every_process_leaves_the_ranks_their_time(tmp_path: Path, ranks: int, first: str) -> None:
    """As Slurm and `kill -- -GROUP` send it: the launcher process dies of it, whether the supervisor knows already."""
    names = [str(rank) for rank in range(ranks)]
    process = supervise_ranks(tmp_path / "log", *(rank_that_saves(tmp_path, name) for name in names))
    ready(tmp_path, ranks)
    everyone = [process.pid, *sorted(descendants(process.pid))]
    assert len(everyone) == 2 + ranks
    for pid in everyone if first == "supervisor" else everyone[1:] + everyone[:1]:
        os.kill(pid, signal.SIGTERM)
    assert process.wait() == 143
    assert sorted(path.name for path in tmp_path.glob("saved-*")) == [f"saved-{name}" for name in names]


def test_a_signal_to_the_launcher_process_alone_reaches_its_ranks(tmp_path: Path) -> None:
    process = supervise_ranks(tmp_path / "log", rank_that_saves(tmp_path, "0"), rank_that_saves(tmp_path, "1"))
    ready(tmp_path, 2)
    (launcher,) = (pid for pid, parent in descendants(process.pid).items() if parent == process.pid)
    os.kill(launcher, signal.SIGTERM)
    assert process.wait() == 143
    assert len(list(tmp_path.glob("saved-*"))) == 2


def test_ranks_do_not_outlive_a_launcher_process_that_was_killed(tmp_path: Path) -> None:
    process = supervise_ranks(tmp_path / "log", rank_that_saves(tmp_path, "0"))
    ready(tmp_path, 1)
    below = descendants(process.pid)
    (launcher,) = (pid for pid, parent in below.items() if parent == process.pid)
    os.kill(launcher, signal.SIGKILL)
    assert process.wait() == 137
    assert not [pid for pid in below if Path(f"/proc/{pid}").exists()]


def test_a_command_without_ranks_gets_its_time_too(tmp_path: Path) -> None:
    process = supervise(tmp_path / "log", rank_that_saves(tmp_path, "0"))
    ready(tmp_path, 1)
    process.terminate()
    assert process.wait() == 143
    assert (tmp_path / "saved-0").exists()


def test_a_closed_terminal_stops_the_ranks_as_sigterm_does(tmp_path: Path) -> None:
    process = supervise_ranks(tmp_path / "log", rank_that_saves(tmp_path, "0"))
    ready(tmp_path, 1)
    process.send_signal(signal.SIGHUP)
    assert process.wait() == 143
    assert (tmp_path / "saved-0").exists()


def test_nohup_is_heeded(tmp_path: Path) -> None:
    program = f"import pathlib, time; pathlib.Path({str(tmp_path)!r}, 'ready-0').touch(); time.sleep(2)"
    process = supervise(tmp_path / "log", program, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    ready(tmp_path, 1)
    process.send_signal(signal.SIGHUP)
    assert process.wait() == 0


def test_a_signal_that_comes_before_the_command_is_there_is_passed_on(tmp_path: Path) -> None:
    program = f"""
import os, signal, subprocess, sys
from sd3.common import supervise
start = subprocess.Popen
def popen(*arguments, **keywords):
    os.kill(os.getpid(), signal.SIGTERM)
    return start(*arguments, **keywords)
subprocess.Popen = popen
sys.exit(supervise.main(["--log", {str(tmp_path / "log")!r}, "--", "sleep", "60"]))
"""
    begun = time.monotonic()
    result = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (143, "")
    assert time.monotonic() - begun < 30


def test_a_full_disk_costs_lines_of_the_log_but_not_the_run(tmp_path: Path) -> None:
    program = "import time\nfor line in range(3): print(line, flush=True); time.sleep(0.3)\nraise SystemExit(7)"
    process = supervise(Path("/dev/full"), program, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    shown, said = process.communicate()
    assert (process.returncode, shown) == (7, b"0\n1\n2\n")
    assert said == b"/dev/full cannot be written (No space left on device); the run goes on, but lines are lost.\n"


def test_nothing_is_left_behind_by_a_supervisor_that_fails(tmp_path: Path) -> None:
    program = f"""
import sys
from sd3.common import supervise
def pump(self, seconds):
    raise MemoryError(self.child.pid)
supervise.Supervisor.pump = pump
sys.exit(supervise.main(["--log", {str(tmp_path / "log")!r}, "--", "sleep", "60"]))
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True)
    pid = result.stderr.rpartition("MemoryError: ")[2].strip()
    assert pid.isdigit()
    assert not Path(f"/proc/{pid}").exists()


def test_a_command_that_is_not_there_is_something_missing(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "sd3.common.supervise", f"--log={tmp_path / 'log'}", "--", str(tmp_path / "none")],
        cwd=PROJECT, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 3
    assert "No such file or directory" in result.stderr


def ends(tmp_path: Path, *ranks: str) -> tuple[int, str]:
    """Status and output of a supervised launcher of these ranks; the log says the same."""
    process = supervise_ranks(tmp_path / "log", *ranks, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    shown = process.communicate()[0].decode()
    assert (tmp_path / "log").read_text() == shown
    return process.returncode, shown


@pytest.mark.parametrize("ranks", [1, 3])
def test_ranks_that_refuse_the_same_say_it_once_and_give_their_status(tmp_path: Path, ranks: int) -> None:
    refusal = rank_that_refuses("--data=none is no directory; name one.")
    assert ends(tmp_path, *[refusal] * ranks) == (2, "--data=none is no directory; name one.\n")


def test_what_one_rank_alone_refuses_is_seen_and_ends_the_others(tmp_path: Path) -> None:
    begun = time.monotonic()
    waiting = "import time; time.sleep(60)"
    assert ends(tmp_path, waiting, rank_that_refuses("rank 1 alone", 3)) == (3, "rank 1 alone\n")
    assert time.monotonic() - begun < 30


def test_ranks_that_refuse_different_things_are_all_heard(tmp_path: Path) -> None:
    place = f"from pathlib import Path; place = Path({str(tmp_path / 'begun')!r})\n"
    first = rank_that_refuses("one thing", 1, place + "while not place.exists(): time.sleep(0.02)")
    status, shown = ends(tmp_path, first, rank_that_refuses("another", 2, place + "place.touch()"))
    assert status in (1, 2)
    assert sorted(shown.splitlines()) == ["another", "one thing"]


def test_a_rank_that_refused_ends_in_its_own_way(tmp_path: Path) -> None:
    """Only a process that is not killed gets to write what its trackers hold."""
    late = f"import atexit, pathlib; atexit.register(lambda: pathlib.Path({str(tmp_path)!r}, 'written').touch())"
    assert ends(tmp_path, rank_that_refuses("no", 1, late))[0] == 1
    assert (tmp_path / "written").exists()


def test_a_rank_without_a_supervisor_speaks_for_itself(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert refusals.refuse(UserError("said here", 3)) == 3
    assert capsys.readouterr().err == "said here\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(refusals.ADDRESS, str(tmp_path / "gone"))
        assert refusals.refuse(UserError("and here")) == 2
    assert capsys.readouterr().err == "and here\n"
