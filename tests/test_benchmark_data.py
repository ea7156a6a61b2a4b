"""The benchmark of training data: its images, its arithmetic, its refusals, and one small run of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sd3.benchmarks.data import as_table, figures, main
from sd3.benchmarks.data_images import folder_of, photograph
from sd3.benchmarks.data_run import Case, Measured, ProcessesMemory, descendants, run_case
from sd3.common.command_line import UserError
from sd3.common.memory import anonymous_bytes

SCRIPT = Path(__file__).resolve().parent.parent / "sd3" / "benchmark_data.py"


def run(first: float, second: float) -> dict[str, float]:
    return {
        "first_seconds": first, "first_cpu_seconds": first, "first_bytes": first * 2**30, "seconds": second,
        "cpu_seconds": second, "peak_bytes": second * 2**30,
    }  # fmt: skip


RUNS = {
    "5 images": [run(5, 4), run(6, 4), run(7, 5)],
    "100 photographs": [run(13, 5), run(16, 4), run(27, 6)],
    "20 small images": [run(0, 4), run(0, 4), run(0, 4)],
    "300 small images": [run(0, 4.5), run(0, 5), run(0, 4.25)],
}


def test_a_photograph_has_the_detail_of_one(tmp_path: Path) -> None:
    """A real one of 12 megapixels takes 3 to 6 MB; noise would take 15, smooth areas 0.5."""
    image = photograph(3)
    assert (image.size, image.mode) == ((4000, 3000), "RGB")
    image.save(tmp_path / "a.jpg", quality=90)
    assert 2.5e6 < (tmp_path / "a.jpg").stat().st_size < 6e6
    small = photograph(3, (400, 300)), photograph(3, (400, 300)), photograph(4, (400, 300))
    assert small[0] == small[1] != small[2]
    assert np.asarray(small[0]).std(axis=(0, 1)).min() > 20


def test_image_folders_are_made_once(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "new", "photographs", 1)
    (file,) = folder.iterdir()
    with Image.open(file) as image:
        assert (image.format, image.size) == ("JPEG", (4000, 3000))
    made = file.stat().st_mtime_ns
    assert folder_of(tmp_path / "new", "photographs", 1) == folder
    assert file.stat().st_mtime_ns == made
    small = folder_of(tmp_path, "small", 3)
    assert [Image.open(each).size for each in small.iterdir()] == [(64, 64)] * 3


def test_figures_are_of_pairs() -> None:
    assert figures(RUNS, 100, 300) == {
        "second_ratio": {"min": 1.0, "median": 1.2, "max": 1.25},
        "first_extra_seconds": {"min": 0.08, "median": 0.1, "max": 0.2},
        "second_extra_seconds": {"min": 0.25, "median": 0.5, "max": 1.0},
    }
    assert list(figures(RUNS, 100, 0)) == ["second_ratio", "first_extra_seconds"]
    assert list(figures(RUNS, 0, 300)) == ["second_extra_seconds"]


def test_the_table_has_each_run_and_each_goal() -> None:
    result = {
        "photographs": 100, "small": 300, "pairs": 3, "machine": {"cores": 2}, "runs": RUNS,
        "goals": {"second_ratio": 1.2, "first_extra_seconds": 0.08, "second_extra_seconds": 1.0},
        "figures": figures(RUNS, 100, 300),
    }  # fmt: skip
    table = as_table(result)
    assert "| 100 photographs | 16.0, 5.0 | 16.0, 5.0 | 16.00, 5.00 |" in table
    assert "| 300 small images | -, 4.5 | -, 4.5 | -, 4.50 |" in table
    assert "| second run, 100 photographs over 5 images | 1.000, 1.200, 1.250 | 1.2 |" in table
    assert "| first run, seconds more for each photograph | 0.080, 0.100, 0.200 | 0.08 |" in table
    assert "| second run, seconds more with 300 small images than with 20 | 0.250, 0.500, 1.000 | 1 |" in table


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--photographs=-1"], "--photographs=-1 is below 0; give how many, or 0 to leave them out."),
        (["--small=-20"], "--small=-20 is below 0; give how many, or 0 to leave them out."),
        (["--photographs=0", "--small=0"], "--photographs=0 and --small=0 leave nothing to measure; give one of them."),
        (["--pairs=0"], "--pairs=0 is too few; give 1 or more."),
        (["--keep=/dev/null/x"], "--keep=/dev/null/x: images cannot be made"),
        (["--photographs=many"], "--photographs"),
        (["--output=/dev/null/figures.json"], "--output=/dev/null/figures.json"),
    ],
)
def test_refusals(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main(arguments, SCRIPT)
    except SystemExit as error:
        status = error.code
    said = capsys.readouterr().err
    assert (status, said.count("Traceback")) == (2, 0)
    assert sentence in said


def test_memory_is_that_of_all_processes() -> None:
    """A shell, and two that it starts and that hold 60 MB each until their input ends."""
    hold = f"{sys.executable} -c 'import sys; held = bytearray(60_000_000); sys.stdin.read()' <&0"
    with subprocess.Popen(["bash", "-c", f"{hold} & {hold}; wait"], stdin=subprocess.PIPE) as shell:
        with ProcessesMemory(shell.pid) as memory:
            until = time.monotonic() + 60
            while memory.peak < 120e6 and time.monotonic() < until:
                time.sleep(0.05)
            found = descendants(shell.pid)
            shell.stdin.close()
            shell.wait()
    assert len(found) == 3
    assert 120e6 < memory.peak < 250e6
    assert anonymous_bytes(shell.pid) == 0  # it has ended
    assert anonymous_bytes("self") > 1e6


@pytest.mark.parametrize("shared", [False, True])
def test_the_first_run_has_a_new_cache_and_the_second_one_the_same(
    shared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches: list[Path] = []

    def start_once(_case: Case, cache: Path, output: Path) -> tuple[float, float, int]:
        assert not output.exists()
        output.mkdir()
        caches.append(cache)
        return 10.0 * len(caches), 2.0 * len(caches), len(caches)

    monkeypatch.setattr("sd3.benchmarks.data_run.start_once", start_once)
    measured = run_case(Case("data", cache="/kept" if shared else ""), tmp_path)
    assert caches == ([Path("/kept")] if shared else [tmp_path / "precomputed"] * 2)
    assert measured == (Measured(0, 0, 0, 10, 2, 1) if shared else Measured(10, 2, 1, 20, 4, 2))


def test_a_failed_start_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the launcher ended with status 2: --input_dir=/gone "):
        run_case(Case("/gone"), tmp_path)


@pytest.mark.long
def test_a_small_run(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--photographs=2", "--small=30", "--pairs=1", f"--output={tmp_path / 'f.json'}"],
        text=True, capture_output=True, timeout=800, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "f.json").read_text(encoding="utf-8"))
    assert list(found["runs"]) == ["5 images", "2 photographs", "20 small images", "30 small images"]
    for name, (measured,) in found["runs"].items():
        assert 1 < measured["cpu_seconds"] and 1 < measured["seconds"]
        assert 100e6 < measured["peak_bytes"] < 4e9
        assert (measured["first_seconds"] > 0) == ("small" not in name)
    assert done.stdout.strip() == as_table(found)
