"""The two READMEs say the same, their links lead somewhere, and their tables name what is there."""

from __future__ import annotations

import re

import pytest

from readme_parts import anchor, commands, links, parse, quoted
from repository import PROJECT, relative, tracked_files

ENGLISH = PROJECT / "README.md"
CHINESE = PROJECT / "README_zh.md"
BOTH = [ENGLISH, CHINESE]


def pairs() -> list[tuple]:
    return list(zip(parse(ENGLISH), parse(CHINESE), strict=True))


def test_same_headings() -> None:
    assert [section.level for section in parse(ENGLISH)] == [section.level for section in parse(CHINESE)]


def test_same_commands() -> None:
    for english, chinese in pairs():
        assert [commands(c) for c in english.code] == [commands(c) for c in chinese.code], english.title


def test_same_tables() -> None:
    """Same tables, same rows; the first column names the same options, files, variables and addresses."""
    for english, chinese in pairs():
        assert len(english.tables) == len(chinese.tables), english.title
        for ours, theirs in zip(english.tables, chinese.tables, strict=True):
            assert [len(row) for row in ours] == [len(row) for row in theirs], english.title
            assert [quoted(row[0]) for row in ours] == [quoted(row[0]) for row in theirs], english.title


def test_same_figures() -> None:
    """A number in a table stands in both."""
    for english, chinese in pairs():
        for ours, theirs in zip(english.tables, chinese.tables, strict=True):
            for left, right in zip(ours, theirs, strict=True):
                assert re.findall(r"\d+\.\d+", " ".join(left)) == re.findall(r"\d+\.\d+", " ".join(right)), left[0]


@pytest.mark.parametrize("readme", BOTH, ids=relative)
def test_links_lead_somewhere(readme) -> None:
    sections = parse(readme)
    anchors = {anchor(section.title) for section in sections}
    cells = [cell for section in sections for table in section.tables for row in table for cell in row]
    text = "\n".join([*(section.text for section in sections), *cells])
    for target in links(text):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif "://" not in target:
            assert (PROJECT / target.split("#")[0]).exists(), target


@pytest.mark.parametrize("readme", BOTH, ids=relative)
def test_files_it_names_exist(readme) -> None:
    """Every project file that is named as code exists, so that no section survives what it describes."""
    names = {
        name
        for section in parse(readme)
        for piece in section.code_pieces()
        for name in re.findall(r"(?<![\w./-])(?:sd3|patches|tests)/[\w./-]*\w", piece)
    }
    assert names
    assert not {name for name in names if not (PROJECT / name).exists()}


@pytest.mark.parametrize("readme", BOTH, ids=relative)
def test_every_patch_and_launcher_is_named(readme) -> None:
    text = readme.read_text(encoding="utf-8")
    series = (PROJECT / "patches" / "series").read_text(encoding="utf-8").splitlines()
    patches = [line.split("#")[0].strip().removesuffix(".patch") for line in series]
    launchers = [path.name for path in tracked_files() if re.fullmatch(r"sd3/finetune_\w+\.sh", relative(path))]
    assert len(launchers) == 5
    assert not [name for name in [*filter(None, patches), *launchers] if f"`{name}`" not in text]
