"""The quick start goes through the whole job, and refuses in one line what it cannot do."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from browser import BROWSER, assert_looks_like_something
from patching import free_port
from sd3.quickstart.figures import world_figures

PROJECT = Path(__file__).resolve().parent.parent


def quickstart(*arguments: str, cwd: Path, timeout: float = 60, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(PROJECT / "sd3" / "quickstart.sh"), *arguments], cwd=cwd, capture_output=True, text=True,
        timeout=timeout, env={**os.environ, "SD3_PYTHON": sys.executable, **env},
    )  # fmt: skip


def test_help_names_every_option(tmp_path: Path) -> None:
    result = quickstart("--help", cwd=tmp_path)
    assert result.returncode == 0
    assert {"--output_dir=DIR", "--main_process_port=N"} < set(result.stdout.split())
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_option_is_refused(tmp_path: Path) -> None:
    result = quickstart("--colour=red", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert "--colour=red" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_directory_with_other_files_is_never_emptied(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    result = quickstart("--output_dir=mine", cwd=tmp_path)
    assert result.returncode == 2
    assert "holds other files" in result.stderr
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_a_file_is_never_removed(tmp_path: Path) -> None:
    (tmp_path / "results.html").write_text("years of work")
    result = quickstart("--output_dir=results.html", cwd=tmp_path)
    assert result.returncode == 2
    assert f"--output_dir={tmp_path / 'results.html'} is no directory" in result.stderr
    assert (tmp_path / "results.html").read_text() == "years of work"


def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = quickstart("--output_dir=file/out", cwd=tmp_path)
    assert result.returncode == 2
    assert "cannot be written" in result.stderr and result.stderr.count("\n") == 1


def test_a_quick_start_that_is_still_going_keeps_its_directory(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    with (tmp_path / ".quickstart").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = quickstart("--output_dir=.", cwd=tmp_path)
    assert result.returncode == 2
    assert f"--output_dir={tmp_path} is in use by a quick start" in result.stderr
    assert (tmp_path / "pictures").is_dir()


def test_a_wrong_python_is_said_before_anything_is_installed(tmp_path: Path) -> None:
    result = quickstart("--output_dir=out", cwd=tmp_path, SD3_PYTHON="/no/python")
    assert (result.returncode, result.stdout) == (3, "")
    assert "SD3_PYTHON=/no/python is not a program" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_the_whole_job(tmp_path: Path) -> None:
    """It ends by naming a page, which shows that the subject was learned."""
    out = tmp_path / "quick start"  # a path with a space in it
    result = quickstart(f"--output_dir={out}", f"--main_process_port={free_port()}", cwd=tmp_path, timeout=1800)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    page = out / "quickstart.html"
    assert result.stdout.splitlines()[-1].strip() == str(page)
    for name in ("full", "lora"):
        report = json.loads((out / name / "report.json").read_text(encoding="utf-8"))
        engine = json.loads((out / name / "run_settings.json").read_text(encoding="utf-8"))["engine"]
        # On one process the patched script ends each epoch of five pictures with a batch of one.
        received = 1500 if (name, engine) == ("lora", "diffusers") else 2400
        assert (report["last_step"], report["images_received"], report["exit_status"]) == (600, received, 0)
        assert report["images_per_second"] > 0
    assert (out / "lora" / "pytorch_lora_weights.safetensors").is_file()
    results = json.loads((out / "evaluation" / "metrics.json").read_text(encoding="utf-8"))
    base, *tuned = (one["metrics"]["dino"]["mean"] for one in results["candidates"])
    assert min(tuned) > base + 0.2
    assert len((out / "commands.txt").read_text().splitlines()) == 8
    before, *after = (world_figures(out / "pictures" / name)[0] for name in ("before", "full", "lora"))
    assert (before.right, before.of) == (0, 18)
    assert all(one.right >= 7 for one in after)
    if BROWSER:
        assert_looks_like_something(page, tmp_path, 1000)
