"""The memory of files that were looked at: what it keeps, and that nothing that happens to it stops a run."""

from __future__ import annotations

import multiprocessing
import os
import resource
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from sd3.common import seen as seen_module
from sd3.common.seen import FILE_NAME, SeenFiles


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def seen(tmp_path: Path, said: list[str]) -> SeenFiles:
    return SeenFiles(tmp_path / "cache", said.append)


def again(seen: SeenFiles, said: list[str]) -> SeenFiles:
    """As a later run opens it."""
    return SeenFiles(seen.file.parent, said.append)


def test_what_is_remembered_is_recalled_under_the_same_stamp(seen: SeenFiles, said: list[str]) -> None:
    assert seen.recall("image", ["/a"], ["1"]) == [None]
    assert not seen.file.parent.exists()  # nothing is made before there is something to keep
    seen.remember("image", [("/a", "1", "one"), ("/b", "2", "two")])
    later = again(seen, said)
    assert later.recall("image", ["/b", "/c", "/a", "/a"], ["2", "2", "1", "2"]) == ["two", None, "one", None]
    assert later.recall("entry", ["/a"], ["1"]) == [None]
    assert later.recall("image", ["/a"], [None]) == [None]
    later.remember("image", [("/a", "2", "new")])
    assert seen.recall("image", ["/a", "/b"], ["2", "2"]) == ["new", "two"]
    assert said == []


def test_names_of_any_bytes_and_thousands_of_them(seen: SeenFiles, said: list[str]) -> None:
    names = [os.fsdecode(b"/caf\xe9/%d\0x" % number) for number in range(2001)]
    seen.remember("image", ((name, str(number), f"v{number}") for number, name in enumerate(names)))
    found = again(seen, said).recall("image", names, [str(number) for number in range(2001)])
    assert found == [f"v{number}" for number in range(2001)]


def test_without_a_directory_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    nowhere = SeenFiles(None, pytest.fail)
    nowhere.remember("image", [("/a", "1", "one")])
    assert nowhere.recall("image", ["/a"], ["1"]) == [None]
    assert not list(tmp_path.iterdir())


def garbage(file: Path) -> None:
    file.write_bytes(b"\0garbage" * 500)


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def overwritten(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[5000:] = b"\xff" * (len(content) - 5000)
    file.write_bytes(content)


def directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


def other_table(file: Path) -> None:
    file.unlink()
    with sqlite3.connect(file) as made:
        made.execute("CREATE TABLE seen (something)")


@pytest.mark.parametrize("damage", [garbage, cut_short, overwritten, directory, other_table])
def test_a_damaged_memory_is_told_once_and_left_alone(
    damage: Callable[[Path], None], seen: SeenFiles, said: list[str]
) -> None:
    names = [f"/{number}" for number in range(900)]
    seen.remember("image", [(name, "1", "x" * 50) for name in names])
    damage(seen.file)
    before = seen.file.read_bytes() if seen.file.is_file() else None
    later = again(seen, said)
    assert later.recall("image", names, ["1"] * 900) == [None] * 900
    later.remember("image", [("/new", "1", "new")])
    assert later.recall("image", ["/new"], ["1"]) == [None]
    (line,) = said
    assert line.startswith(f"{seen.file} cannot be used (")
    assert line.endswith("), so files are read again; remove it if that stays so.")
    assert (seen.file.read_bytes() if seen.file.is_file() else None) == before


def test_an_empty_file_is_a_memory_without_anything(seen: SeenFiles, said: list[str]) -> None:
    """As another process leaves it for a moment, between making it and making its table."""
    seen.file.parent.mkdir()
    seen.file.touch()
    assert seen.recall("image", ["/a"], ["1"]) == [None]
    seen.remember("image", [("/a", "1", "one")])
    assert seen.recall("image", ["/a"], ["1"]) == ["one"]
    assert said == []


def test_a_locked_memory_is_waited_for_and_then_gone_without(
    seen: SeenFiles, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seen_module, "LOCKED_SECONDS", 0.1)
    seen.remember("image", [("/a", "1", "one")])
    holder = sqlite3.connect(seen.file, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    later = again(seen, said)
    assert later.recall("image", ["/a"], ["1"]) == [None]
    later.remember("image", [("/b", "1", "two")])
    assert [line.count("database is locked") for line in said] == [1]
    holder.execute("COMMIT")
    assert again(seen, said).recall("image", ["/a", "/b"], ["1", "1"]) == ["one", None]


def forked(work: Callable[[], bool]) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=lambda: os._exit(0 if work() else 1))
    process.start()
    return process


def test_a_full_disk_is_told_and_leaves_the_memory_as_it_was(seen: SeenFiles, said: list[str]) -> None:
    seen.remember("image", [("/a", "1", "one")])

    def work() -> bool:
        size = seen.file.stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        lines: list[str] = []
        full = SeenFiles(seen.file.parent, lines.append)
        full.remember("image", [(f"/{number}", "1", "x" * 100) for number in range(1000)])
        return len(lines) == 1 and "cannot be used" in lines[0] and full.recall("image", ["/a"], ["1"]) == [None]

    process = forked(work)
    process.join(60)
    assert process.exitcode == 0
    assert again(seen, said).recall("image", ["/a", "/5"], ["1", "1"]) == ["one", None]
    assert said == []


def test_a_memory_that_may_only_be_read_is_read(seen: SeenFiles, said: list[str]) -> None:
    """The mode of a file does not hold for root, so the test asks SQLite itself for a connection without writing."""
    seen.remember("image", [("/a", "1", "one")])
    connect = sqlite3.connect
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sqlite3, "connect", lambda file, **given: connect(f"file:{file}?mode=ro", uri=True, **given))
        later = again(seen, said)
        assert later.recall("image", ["/a"], ["1"]) == ["one"]
        later.remember("image", [("/b", "1", "two")])
    assert [line.count("readonly database") for line in said] == [1]


def test_a_directory_that_cannot_be_made_is_told(tmp_path: Path, said: list[str]) -> None:
    (tmp_path / "file").touch()
    seen = SeenFiles(tmp_path / "file" / "cache", said.append)
    seen.remember("image", [("/a", "1", "one")])
    assert seen.recall("image", ["/a"], ["1"]) == [None]
    assert [line.count(f"{tmp_path / 'file' / 'cache' / FILE_NAME} cannot be used") for line in said] == [1]


def test_processes_remember_at_once(seen: SeenFiles, said: list[str]) -> None:
    def work(number: int) -> Callable[[], bool]:
        def run() -> bool:
            lines: list[str] = []
            mine = SeenFiles(seen.file.parent, lines.append)
            for part in range(5):
                mine.remember("image", [(f"/{number}/{part}/{row}", "1", "x") for row in range(100)])
            found = mine.recall("image", [f"/{number}/4/{row}" for row in range(100)], ["1"] * 100)
            return found == ["x"] * 100 and not lines

        return run

    processes = [forked(work(number)) for number in range(4)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    names = [f"/{number}/{part}/{row}" for number in range(4) for part in range(5) for row in range(100)]
    assert seen.recall("image", names, ["1"] * 2000) == ["x"] * 2000


def test_a_crafted_memory_runs_nothing(seen: SeenFiles, said: list[str], tmp_path: Path) -> None:
    """A view of the table's name whose rows call functions: those that could do harm are not trusted."""
    seen.file.parent.mkdir()
    with sqlite3.connect(seen.file) as made:
        made.execute(
            "CREATE VIEW seen AS SELECT 'image' AS kind, x'2f61' AS name, '1' AS stamp, "
            f"load_extension('{tmp_path / 'evil'}') AS value"
        )
    assert seen.recall("image", ["/a"], ["1"]) == [None]
    assert len(said) == 1
