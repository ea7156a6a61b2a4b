"""A script started with a Python that lacks its packages goes on in the project's own, or says what to do."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from sd3.common import npu, start
from sd3.common import venv as project_venv

PROJECT = Path(__file__).resolve().parent.parent
SCRIPT = """import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sd3.common.venv import ensure
ensure(["only_there"])
import only_there
print("ran with", sys.prefix, sys.argv[1:])
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    common = tmp_path / "sd3" / "common"
    common.mkdir(parents=True)
    for name in ("sd3/__init__.py", "sd3/common/__init__.py"):
        (tmp_path / name).write_text("")
    (common / "venv.py").write_text((PROJECT / "sd3" / "common" / "venv.py").read_text())
    (tmp_path / "sd3" / "script.py").write_text(SCRIPT)
    return tmp_path


def make_venv(folder: Path, with_package: bool) -> None:
    venv.create(folder, with_pip=False)
    if with_package:
        site = next((folder / "lib").glob("python3*/site-packages"))
        (site / "only_there.py").write_text("")


def run(project: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "SD3_REEXECUTED"}
    return subprocess.run(
        [sys.executable, str(project / "sd3" / "script.py"), "an argument", "--x"],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip


def test_it_goes_on_in_the_projects_venv_and_says_so(project: Path) -> None:
    make_venv(project / ".venv", with_package=True)
    result = run(project)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"ran with {project / '.venv'} ['an argument', '--x']\n"
    assert len(result.stderr.strip().splitlines()) == 1
    assert "going on with" in result.stderr


def test_a_venv_elsewhere_is_remembered(project: Path) -> None:
    make_venv(project / "else where", with_package=True)
    (project / "build").mkdir()
    (project / "build" / "venv.path").write_text(f"{project / 'else where'}\n")
    assert f"ran with {project / 'else where'}" in run(project).stdout


@pytest.mark.parametrize("empty_venv", [False, True])
def test_without_one_it_exits_3_with_the_command(project: Path, empty_venv: bool) -> None:
    if empty_venv:
        make_venv(project / ".venv", with_package=False)
    result = run(project)
    assert result.returncode == 3
    assert f"run: bash {project / 'setup_env.sh'}" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_old_python_is_no_python_for_the_project(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 8, 18))
    monkeypatch.setattr(project_venv, "project_python", lambda: None)
    with pytest.raises(SystemExit) as ended:
        project_venv.ensure([])
    assert ended.value.code == 3
    assert "lacks Python 3.10 or later" in capsys.readouterr().err


def started(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | None:
    """Status that start() ends a script with; None where it lets it go on."""
    monkeypatch.setattr(sys, "argv", ["script.py", *arguments])
    try:
        start.start([])
    except SystemExit as ended:
        return ended.code
    return None


def test_an_npu_without_torch_npu_or_cann_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(start, "NPU_DEVICES", str(tmp_path / "davinci[0-9]*"))
    # Nobody asks for an NPU and there is none; then one is there, then it is turned down, then asked for.
    assert started(monkeypatch) is None
    (tmp_path / "davinci_manager").touch()
    assert started(monkeypatch) is None
    (tmp_path / "davinci4").touch()
    assert started(monkeypatch) == started(monkeypatch, "--device=auto") == 3
    assert "setup_env.sh --device=npu" in capsys.readouterr().err
    assert started(monkeypatch, "--device", "cpu") is None
    assert started(monkeypatch, "--device=npu", "--help") is None
    # With torch_npu at hand it is CANN that is missing: its set_env.sh is named where it can be found.
    monkeypatch.setattr(npu, "is_installed", lambda: True)
    monkeypatch.setattr(npu, "load_error", lambda: "libhccl.so is missing")
    script = tmp_path / "set_env.sh"
    script.touch()
    monkeypatch.setenv("CANN_SET_ENV", str(script))
    assert started(monkeypatch, "--device=npu") == 3
    assert f"(libhccl.so is missing); run: source {script}" in capsys.readouterr().err
    assert started(monkeypatch, "--device=cpu") == 3  # torch cannot be imported then
    monkeypatch.setenv("CANN_SET_ENV", str(tmp_path / "none.sh"))
    assert started(monkeypatch, "--device=npu") == 3
    assert "name CANN's set_env.sh" in capsys.readouterr().err
    monkeypatch.setattr(npu, "load_error", lambda: "")
    assert started(monkeypatch, "--device=npu") is None
