"""The quick start goes through the whole job, and refuses in one line what it cannot do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent


def quickstart(*arguments: str, cwd: Path, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(PROJECT / "sd3" / "quickstart.sh"), *arguments], cwd=cwd, capture_output=True, text=True,
        timeout=timeout, env={**os.environ, "SD3_PYTHON": sys.executable},
    )  # fmt: skip


def test_help_names_every_option(tmp_path: Path) -> None:
    result = quickstart("--help", cwd=tmp_path)
    assert result.returncode == 0
    assert "--output_dir=DIR" in result.stdout
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


@pytest.mark.long
@pytest.mark.upstream
def test_the_whole_job(upstream_checkout: Path, tmp_path: Path) -> None:
    out = tmp_path / "quick start"  # a path with a space in it
    result = quickstart(f"--output_dir={out}", cwd=tmp_path, timeout=800)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    full = json.loads((out / "full" / "report.json").read_text(encoding="utf-8"))
    lora = json.loads((out / "lora" / "report.json").read_text(encoding="utf-8"))
    assert (full["last_step"], full["sessions"], full["exit_status"]) == (20, 2, 0)
    assert (lora["last_step"], lora["exit_status"]) == (12, 0)
    assert full["images_received"] == 20 * 2
    assert full["images_per_second"] > 0
    assert full["final_train_loss"] is not None
    assert result.stdout.count("Final Performance images/sec : ") == 3
    assert (out / "full" / "checkpoint-18").is_dir()
    assert (out / "lora" / "pytorch_lora_weights.safetensors").is_file()
    named = [Path(line.strip()) for line in result.stdout.splitlines() if line.strip().startswith(str(out))]
    pictures = [path for path in named if path.name.startswith("validation-")]
    assert pictures
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
