"""The supervisor's parts, and what it does for a terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sd3.common.supervise import LogLines, Masker

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
    program = "import time; print('now', flush=True); time.sleep(3)"
    begun = time.monotonic()
    process = supervise(tmp_path / "log", program, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"now\n"
    assert time.monotonic() - begun < 2.5
    process.wait()


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
