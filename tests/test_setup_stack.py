"""What set-up refuses of Pythons and environments, and how it finds CANN. Nothing is installed here."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent


def fake_python(folder: Path, version: str) -> Path:
    """A program that answers the questions set-up asks of a Python, as one of that version would."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "python"
    numbers = tuple(int(part) for part in version.split("."))
    program.write_text(
        "#!/usr/bin/env python3\nimport platform, sys\n"
        f"sys.version_info = {numbers}\nplatform.python_version = lambda: {version!r}\n"
        "exec(sys.argv[2])\n"
    )
    program.chmod(0o755)
    return program


def bash(script: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("ASCEND", "CANN"))}
    return subprocess.run(
        ["bash", "-c", script, "bash", *arguments], cwd=PROJECT, env={**clean, **env}, capture_output=True, text=True
    )


def choose(stack: str, python: Path) -> subprocess.CompletedProcess[str]:
    script = (
        'set -euo pipefail; die() { echo "$1" >&2; exit "$2"; }; USE_VENV=1 STACK=$1 PYTHON_EXE=$2; '
        ". sd3/launch/setup_stack.sh; choose_python; echo chosen"
    )
    return bash(script, stack, str(python))


@pytest.mark.parametrize(
    ("stack", "version", "fits"),
    [
        *(("default", "3.9.18", False), ("default", "3.10.13", True), ("default", "3.12.1", True)),
        *(("default", "3.13.0", False), ("torch2.1", "3.11.7", True), ("torch2.1", "3.12.1", False)),
    ],
)
def test_a_python_without_wheels_is_refused_by_name(tmp_path: Path, stack: str, version: str, fits: bool) -> None:
    result = choose(stack, fake_python(tmp_path, version))
    assert result.returncode == (0 if fits else 2), result.stderr
    assert fits or f"Python {version}" in result.stderr


def test_a_folder_that_is_no_venv_is_not_filled(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    script = (
        'set -euo pipefail; die() { echo "$1" >&2; exit "$2"; }; USE_VENV=1 STACK=default BASE_PYTHON=python3 VENV=$1; '
        ". sd3/launch/setup_stack.sh; make_venv"
    )
    result = bash(script, str(tmp_path / "mine"))
    assert result.returncode == 2
    assert "is no virtual environment" in result.stderr
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("kept", "status"),
    [
        ("torch==2.7.1 torch_npu==2.7.1.post11", 0),
        ("torch==2.1.0 torchvision==0.16.0 torch_npu==2.1.0", 0),
        ("torch==2.6.0 torch_npu==2.7.1", 2),
        ("torch==2.6.0", 0),
    ],
)
def test_torch_and_torch_npu_must_be_of_one_version(kept: str, status: int) -> None:
    script = 'die() { echo "$1" >&2; exit "$2"; }; . sd3/launch/setup_stack.sh; check_pair "$1"'
    result = bash(script, kept)
    assert result.returncode == status
    assert not status or "do not match" in result.stderr


CANN = 'set -euo pipefail; . sd3/launch/cann.sh; source_cann || exit $?; echo "$CANN_FAKE"; false; echo lived'


def write_cann(folder: Path) -> Path:
    """A set_env.sh as CANN's is: it minds neither set -u nor set -e."""
    folder.mkdir(parents=True)
    script = folder / "set_env.sh"
    script.write_text('export LD_LIBRARY_PATH="/cann:$NEVER_SET_BY_ANYONE"\nfalse\nexport CANN_FAKE=found\n')
    return script


@pytest.mark.parametrize("place", ["ascend-toolkit", "cann"])
def test_cann_is_found_in_its_usual_places(tmp_path: Path, place: str) -> None:
    write_cann(tmp_path / place)
    result = bash(CANN, CANN_ROOT=str(tmp_path))
    assert result.stdout == "found\n", result.stderr  # and errexit is on again: "lived" is not printed


def test_cann_is_found_by_its_home_and_by_name(tmp_path: Path) -> None:
    script = write_cann(tmp_path / "toolkit")
    (tmp_path / "toolkit" / "latest").mkdir()
    assert bash(CANN, ASCEND_TOOLKIT_HOME=str(tmp_path / "toolkit" / "latest")).stdout == "found\n"
    assert bash(CANN, CANN_SET_ENV=str(script)).stdout == "found\n"


def test_cann_that_is_missing_is_refused_with_the_places(tmp_path: Path) -> None:
    result = bash(CANN, CANN_ROOT=str(tmp_path))
    assert result.returncode == 3
    assert f"{tmp_path}/ascend-toolkit" in result.stderr
    assert "CANN_SET_ENV" in result.stderr


@pytest.mark.parametrize("name", ["requirements_sd3.txt", "requirements_sd3_torch2.1.txt"])
def test_every_requirement_is_pinned(name: str) -> None:
    lines = (PROJECT / name).read_text(encoding="utf-8").splitlines()
    for line in lines:
        if line and not line.startswith("#"):
            assert re.fullmatch(r"[\w-]+==[\w.]+", line), line
