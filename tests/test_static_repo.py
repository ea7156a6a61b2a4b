"""House rules that hold for every file of the repository."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from repository import MODELS, relative, text_of, tracked_files

MAX_LINES = 500
MAX_BYTES = 1_000_000
WEIGHTS = {".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".onnx", ".npz", ".npy", ".parquet", ".whl", ".pkl"}
WRITTEN = [path for path in tracked_files() if not relative(path).startswith(tuple(MODELS))]
# Directories that exist on somebody's machine only. Written in pieces, so that this file does not match itself.
MACHINE_PATH = re.compile(r"(?<![\w.$}/-])/(?:wor" r"k|roo" r"t|hom" r"e/[a-z]\w*|Use" r"rs/\w+|mn" r"t/\w+)(?=/)")
REQUIREMENTS = [path for path in tracked_files() if re.match(r"requirements.*\.txt$", path.name)]
SHELLS = [path for path in tracked_files() if path.suffix == ".sh" or relative(path) == ".ci/run"]


def offenders(found: dict[str, object]) -> str:
    return "\n".join(f"{name}: {what}" for name, what in found.items())


def machine_paths(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if MACHINE_PATH.search(line)]


def shell_fault(path: Path, text: str) -> str | None:
    """Why a shell file breaks the rules, or None: executables are strict, sourced files say that they are sourced."""
    if text.startswith("#!"):
        if not re.search(r"^set -euo pipefail$", text, re.MULTILINE):
            return "has a shebang but no line 'set -euo pipefail'"
        if os.access(path, os.X_OK) and not text.startswith("#!/usr/bin/env bash\n"):
            return "is executable without '#!/usr/bin/env bash'"
        return None
    if "# shellcheck shell=bash" not in text.splitlines()[:3]:
        return "has neither a shebang nor '# shellcheck shell=bash' among its first lines"
    return None


def test_no_file_is_too_long() -> None:
    counts = {relative(path): text_of(path).count("\n") for path in WRITTEN if path.suffix != ".png"}
    assert len(counts) > 10
    long = {name: f"{lines} lines" for name, lines in counts.items() if lines > MAX_LINES}
    assert not long, offenders(long)


def test_no_file_is_too_big() -> None:
    big = {relative(path): path.stat().st_size for path in WRITTEN if path.stat().st_size > MAX_BYTES}
    assert not big, offenders(big)


@pytest.mark.parametrize("model", MODELS)
def test_a_model_that_ships_is_small(model: str) -> None:
    sizes = [path.stat().st_size for path in tracked_files() if relative(path).startswith(model)]
    assert 0 < sum(sizes) < MODELS[model]


def test_no_weights() -> None:
    weights = {relative(path): path.suffix for path in WRITTEN if path.suffix.lower() in WEIGHTS}
    assert not weights, offenders(weights)


def test_no_machine_paths() -> None:
    found = {relative(path): lines for path in tracked_files() if (lines := machine_paths(text_of(path)))}
    assert not found, offenders(found)


@pytest.mark.parametrize("line", ["cd /roo" "t/x", "p = '/hom" "e/me/x'", "/wor" "k/a"])
def test_machine_paths_are_seen(line: str) -> None:
    assert machine_paths(line) == [line]


@pytest.mark.parametrize("line", ["/usr/local/Ascend/cann", "$HOME/data", "a/work/b", "https://a.example/work/b"])
def test_other_paths_are_not(line: str) -> None:
    assert machine_paths(line) == []


@pytest.mark.parametrize("path", SHELLS, ids=relative)
def test_shell_files_are_strict(path: Path) -> None:
    assert shell_fault(path, text_of(path)) is None


def test_a_lax_script_is_seen(tmp_path: Path) -> None:
    assert shell_fault(tmp_path, "#!/usr/bin/env bash\nset -e\n")
    assert shell_fault(tmp_path, "echo sourced\n")
    assert shell_fault(tmp_path, "# shellcheck shell=bash\nf() { :; }\n") is None


def test_text_files_end_their_lines_alike() -> None:
    bad = {
        relative(path): "carriage return, or no newline at the end"
        for path in WRITTEN
        if path.suffix not in {".patch", ".png"} and ("\r" in text_of(path) or not text_of(path).endswith("\n"))
        if path.stat().st_size
    }
    assert not bad, offenders(bad)


@pytest.mark.parametrize("path", REQUIREMENTS, ids=relative)
def test_requirements_are_pinned_exactly(path: Path) -> None:
    lines = [line.split("#")[0].strip() for line in text_of(path).splitlines()]
    loose = [line for line in lines if line and not line.startswith("-") and "==" not in line]
    assert not loose, f"not pinned with ==: {loose}"
