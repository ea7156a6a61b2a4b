"""Each README and its translation say the same, their links lead somewhere, and their tables name what is there."""

from __future__ import annotations

import re

import pytest

from readme_parts import anchor, commands, links, parse, quoted
from repository import PROJECT, relative, tracked_files

FOLDERS = sorted(path.parent for path in tracked_files() if path.name == "README.md")
BOTH = [folder / name for folder in FOLDERS for name in ("README.md", "README_zh.md")]


def pairs() -> list[tuple]:
    """Each English section with its Chinese one."""
    return [
        pair
        for folder in FOLDERS
        for pair in zip(parse(folder / "README.md"), parse(folder / "README_zh.md"), strict=True)
    ]


def test_same_headings() -> None:
    for english, chinese in pairs():
        assert english.level == chinese.level, english.title


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
    cells = [cell for section in sections for table in section.tables for row in table for cell in row]
    text = "\n".join([*(section.text for section in sections), *cells])
    for target in links(text):
        if "://" not in target:
            name, _, part = target.partition("#")
            file = readme.parent / name if name else readme
            assert file.exists(), target
            assert not part or part in {anchor(section.title) for section in parse(file)}, target


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


@pytest.mark.parametrize("name", ["README.md", "README_zh.md"])
def test_every_patch_and_launcher_is_named(name: str) -> None:
    series = (PROJECT / "patches" / "series").read_text(encoding="utf-8").splitlines()
    patches = [patch for line in series if (patch := line.split("#")[0].strip().removesuffix(".patch"))]
    launchers = [path.name for path in tracked_files() if re.fullmatch(r"sd3/finetune_\w+\.sh", relative(path))]
    assert len(launchers) == 5
    readme, of_patches = ((folder / name).read_text(encoding="utf-8") for folder in (PROJECT, PROJECT / "patches"))
    assert not [launcher for launcher in launchers if f"`{launcher}`" not in readme]
    assert not [patch for patch in patches if f"`{patch}`" not in of_patches]
    # The overview counts them.
    assert re.search(rf"\b{len(patches)}\b", readme)
