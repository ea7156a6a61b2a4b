"""The option tables of the READMEs, in both languages, against what each program's --help says."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache

import pytest

from readme_parts import parse, quoted
from repository import PROJECT, relative, text_of, tracked_files

READMES = ["README.md", "README_zh.md"]
LAUNCHERS = [relative(path) for path in tracked_files() if re.fullmatch(r"sd3/finetune_\w+\.sh", relative(path))]
LAUNCH = PROJECT / "sd3" / "launch"
OPTION = re.compile(r"--[a-z][\w-]*")


def interpreter(program: str) -> str:
    return "python" if program.endswith(".py") else "bash"


@cache
def help_of(program: str) -> str:
    run_with = {"python": sys.executable, "bash": "bash"}[interpreter(program)]
    done = subprocess.run(
        [run_with, str(PROJECT / program), "--help"], capture_output=True, text=True, timeout=60,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def options_in_help(program: str) -> set[str]:
    """Options that begin a line of the help text, aliases and alternatives on that line included."""
    found: set[str] = set()
    for line in help_of(program).splitlines():
        if re.match(r"\s*(?:-\w,? *)?--[a-z]", line):
            head = re.split(r"\s{2,}", line.strip())[0]
            found |= set(OPTION.findall(head))
    return found


def options_in_readme(readme: str, program: str) -> set[str]:
    """Options in the first column of the tables of the section that names the program's --help."""
    named = f"`{interpreter(program)} {program} --help`"
    sections = [section for section in parse(PROJECT / readme) if named in section.text]
    assert len(sections) == 1, f"{readme}: one section has to name {named}"
    rows = [row for table in sections[0].tables for row in table]
    return {option for row in rows for piece in quoted(row[0]) for option in OPTION.findall(piece)}


def test_launchers_share_their_options() -> None:
    assert len(LAUNCHERS) == 5
    assert len({frozenset(options_in_help(launcher)) for launcher in LAUNCHERS}) == 1
    assert len(options_in_help(LAUNCHERS[0])) > 20


@pytest.mark.parametrize("readme", READMES)
@pytest.mark.parametrize(
    ("folder", "program"),
    [
        ("", "setup_env.sh"),
        ("", "sd3/finetune_sd3_dreambooth_lora_fp16.sh"),
        ("sd3/inference/", "sd3/infer_sd3_text2img.py"),
        ("sd3/evaluation/", "sd3/evaluate_sd3.py"),
    ],
)
def test_the_table_is_the_help(folder: str, readme: str, program: str) -> None:
    assert options_in_readme(folder + readme, program) == options_in_help(program)


@pytest.mark.parametrize("readme", READMES)
def test_the_environment_table_is_what_launchers_set(readme: str) -> None:
    source = (LAUNCH / "ascend_env.sh").read_text(encoding="utf-8")
    rows = [line.split("|") for line in re.search(r"ASCEND_TABLE='(.*?)'", source, re.DOTALL)[1].splitlines()]
    table = next(t for s in parse(LAUNCH / readme) for t in s.tables if quoted(t[1][0]) == [rows[0][0]])
    assert [(quoted(row[0])[0], row[2]) for row in table[1:]] == [(row[0], row[1]) for row in rows]
    # On an NPU alone: every one but the two that mean something everywhere.
    assert [row[1] == "NPU" for row in table[1:]] == [
        row[0] not in {"TOKENIZERS_PARALLELISM", "OMP_NUM_THREADS"} for row in rows
    ]


@pytest.mark.parametrize("readme", READMES)
def test_the_messages_exist(readme: str) -> None:
    """Troubleshooting goes by messages that the programs really print."""
    code = "\n".join(
        text_of(path)
        for path in tracked_files()
        if path.suffix in {".sh", ".py"} and not relative(path).startswith("tests/")
    )
    section = next(s for s in parse(PROJECT / readme) if s.title in {"Troubleshooting", "常见报错"})
    messages = [piece for row in section.tables[0][1:] for piece in quoted(row[0])]
    assert len(messages) > 10
    assert not [message for message in messages if message not in code]
