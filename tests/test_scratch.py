"""Temporary directories of runs: one each, short enough for sockets, gone afterwards, swept where a run was killed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sd3.common import scratch as scratch_module
from sd3.common.command_line import UserError
from sd3.common.scratch import LONGEST, Scratch, sweep
from test_supervise import LAUNCHER, PROJECT, ready, until

MAKER = """
import pathlib, sys, time
from sd3.common.scratch import Scratch
made = Scratch()
print(made.folder, flush=True)
time.sleep(600)
"""


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A short TMPDIR of this test."""
    with tempfile.TemporaryDirectory(prefix="t-") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield Path(folder)


def maker() -> tuple[subprocess.Popen[str], Path]:
    """Another process with a temporary directory."""
    process = subprocess.Popen([sys.executable, "-c", MAKER], cwd=PROJECT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_it_is_made_for_all_below_and_removed(place: Path) -> None:
    made = Scratch()
    assert made.folder.parent == place and made.folder.name.startswith(f"sd3-{os.getpid()}-")
    assert made.folder.stat().st_mode & 0o777 == 0o700
    assert made.environment["TMPDIR"] == str(made.folder)
    assert Path(made.environment["TORCHINDUCTOR_CACHE_DIR"]).parent == place  # for later runs too
    (made.folder / "pymp-x").mkdir()
    made.remove()
    assert list(place.iterdir()) == []


def test_what_a_killed_run_left_is_swept_and_nothing_else(place: Path) -> None:
    killed, left = maker()
    (left / "tmp123").mkdir()
    (left / "tmp123" / "file").write_text("x")
    alive, used = maker()
    killed.kill()
    killed.wait()
    others = [place / name for name in ("sd3-notes", "sd3-1-x", "tmpabc", "pymp-abc")]
    for other in others:
        other.mkdir()
    outside = place / "outside"
    outside.mkdir()
    (place / "sd3-2-link").symlink_to(outside)
    mine = Scratch()
    assert not left.exists()
    assert used.exists() and mine.folder.exists() and outside.exists()
    assert all(other.exists() for other in others)
    alive.kill()
    alive.wait()
    assert sweep(place) == [used]


def test_a_directory_that_never_was_locked_is_swept_after_a_day(place: Path) -> None:
    for name, age in (("sd3-1-new", 3600), ("sd3-1-old", 2 * 86400)):
        (place / name).mkdir()
        os.utime(place / name, (time.time() - age,) * 2)
    assert sweep(place) == [place / "sd3-1-old"]


def test_another_users_directory_is_left(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed, left = maker()
    killed.kill()
    killed.wait()
    monkeypatch.setattr(scratch_module.os, "geteuid", lambda: os.getuid() + 1)
    assert sweep(place) == [] and left.exists()


@pytest.mark.parametrize("length", [LONGEST - 30, LONGEST, 100, 150, 240])
def test_its_sockets_have_addresses_however_long_tmpdir_is(
    length: int, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = place / ("x" * (length - len(str(place)) - 1))
    usual.mkdir()
    monkeypatch.setenv("TMPDIR", str(usual))
    made = Scratch()
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            (made.folder / "pymp-12345678").mkdir()
            listener.bind(str(made.folder / "pymp-12345678" / "listener-12345678"))
        short = length <= LONGEST - 30
        assert (made.folder.parent == usual) == short
        assert made.note == ("" if short else (
            f"TMPDIR={usual} is too long for sockets or cannot be written; temporary files of this run are in "
            f"{made.folder}."
        ))  # fmt: skip
    finally:
        made.remove()


def test_no_place_is_a_sentence(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    monkeypatch.setattr(scratch_module, "OTHER_PLACES", ("/proc/none",))
    monkeypatch.setenv("TMPDIR", str(place))
    monkeypatch.setattr(scratch_module.tempfile, "gettempdir", lambda: "/proc/nowhere")
    with pytest.raises(UserError, match="TMPDIR: none of /proc/nowhere, /proc/none can be written"):
        Scratch()


@pytest.mark.parametrize("end", ["", "raise SystemExit(3)", "import os; os.kill(os.getpid(), 9)"])
def test_what_a_supervised_command_leaves_is_gone_with_it(place: Path, end: str) -> None:
    program = f"import tempfile; print(tempfile.mkdtemp(), tempfile.mkdtemp(prefix='pymp-'), flush=True); {end}"
    command = [sys.executable, "-m", "sd3.common.supervise", f"--log={place / 'log'}", "--"]
    command += [sys.executable, "-c", program]
    shown = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True).stdout.split()
    assert len(shown) == 2 and all(Path(one).parent.parent == place for one in shown)
    assert [path.name for path in place.iterdir()] == ["log"]


def test_ranks_in_their_grace_keep_the_directory_of_a_killed_supervisor(place: Path) -> None:
    program = f"""
import pathlib, signal, time
from sd3.common import orphans
orphans.stop_without_supervisor()
signal.signal(signal.SIGTERM, lambda *_: pathlib.Path({str(place)!r}, "told").touch())
pathlib.Path({str(place)!r}, "ready-0").touch()
while True:
    time.sleep(1)
"""
    command = [sys.executable, "-m", "sd3.common.supervise", f"--log={place / 'log'}", "--grace=3", "--"]
    process = subprocess.Popen([*command, sys.executable, "-c", LAUNCHER, program], cwd=PROJECT)
    ready(place, 1)
    (folder,) = place.glob("sd3-*")
    process.kill()
    process.wait()
    until((place / "told").exists)
    assert sweep(place) == [] and folder.exists()
    until(lambda: sweep(place) == [folder])
    assert not folder.exists()
