"""torch_npu is installed, but CANN is not loaded, or half of it: every launcher and script says so in one sentence."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from emulated_npu import EmulatedNpu
from launching import LAUNCHERS
from repository import PROJECT

SCRIPTS = sorted(path.name for path in (PROJECT / "sd3").glob("*.py") if "start()" in path.read_text("utf-8")) + [
    f"native/train_dreambooth_{kind}sd3.py" for kind in ("", "lora_")
]
MISSING = (("all", "auto"), ("libraries", "cuda"), ("a directory", "auto"))
LIBRARIES = ("ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH", "ASCEND_OPP_PATH", "LD_LIBRARY_PATH")


def environment(npu: EmulatedNpu, missing: str, tmp_path: Path) -> dict[str, str]:
    """An environment with torch_npu where CANN's is not loaded ("all"), or lacks its libraries, or one directory."""
    made = npu.environment()
    if missing == "all":
        made = {name: value for name, value in made.items() if name not in LIBRARIES}
    elif missing == "libraries":
        made.pop("LD_LIBRARY_PATH")
    else:
        half = tmp_path / "cann"
        half.mkdir()
        made |= dict.fromkeys(LIBRARIES[:2], str(half))
    return made


def refusal(command: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """Exit status and what it says on standard error."""
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stdout + done.stderr
    return done.returncode, done.stderr


def told_in_one_sentence(told: tuple[int, str], npu: EmulatedNpu) -> bool:
    advice = re.escape(f"run: source {npu.built / 'cann' / 'set_env.sh'}\n")
    sentence = rf"CANN's environment is not loaded, so torch_npu does not load \([^\n]+\); {advice}"
    return told[0] == 3 and re.fullmatch(sentence, told[1]) is not None


@pytest.mark.npu
@pytest.mark.parametrize(
    ("script", "missing", "device"),
    [
        ("infer_sd3_text2img.py", "all", "cpu"),
        ("infer_sd3_text2img.py", "a directory", "npu"),
        *(pytest.param(name, missing, device, marks=pytest.mark.long)
          for name in SCRIPTS for missing, device in MISSING),
    ],
)  # fmt: skip
def test_a_script_says_that_cann_is_not_loaded(
    emulated_npu: EmulatedNpu, tmp_path: Path, script: str, missing: str, device: str
) -> None:
    command = [sys.executable, str(PROJECT / "sd3" / script), f"--device={device}"]
    assert told_in_one_sentence(refusal(command, environment(emulated_npu, missing, tmp_path)), emulated_npu)


@pytest.mark.npu
@pytest.mark.parametrize(
    ("launcher", "missing", "device"),
    [
        (LAUNCHERS[0], "all", "cpu"),
        *(pytest.param(name, missing, device, marks=pytest.mark.long)
          for name in LAUNCHERS for missing, device in MISSING),
    ],
)  # fmt: skip
def test_a_launcher_says_that_cann_is_not_loaded(
    emulated_npu: EmulatedNpu, tmp_path: Path, dog_dir: Path, tiny_model: Path, launcher: str, missing: str, device: str
) -> None:
    arguments = [f"--device={device}", f"--model_name={tiny_model}", f"--input_dir={dog_dir}", "--mixed_precision=bf16"]
    command = ["bash", str(PROJECT / "sd3" / launcher), *arguments, f"--output_dir={tmp_path / 'run'}"]
    told = refusal(command, environment(emulated_npu, missing, tmp_path))
    assert told_in_one_sentence(told, emulated_npu)
    assert not (tmp_path / "run").exists()


@pytest.mark.npu
def test_help_needs_no_cann(emulated_npu: EmulatedNpu, tmp_path: Path) -> None:
    command = [sys.executable, str(PROJECT / "sd3" / "infer_sd3_text2img.py"), "--help"]
    assert refusal(command, environment(emulated_npu, "all", tmp_path)) == (0, "")
