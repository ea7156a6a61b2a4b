"""The native engine's README against its flags, in both languages."""

from __future__ import annotations

import pytest

from readme_parts import parse, quoted
from repository import PROJECT
from sd3.native.options import SECTIONS


@pytest.mark.parametrize(("readme", "title"), [("README.md", "Its own options"), ("README_zh.md", "自有参数")])
def test_the_table_has_the_engines_own_options(readme: str, title: str) -> None:
    section = next(section for section in parse(PROJECT / "sd3" / "native" / readme) if section.title == title)
    named = [quoted(row[0])[0] for row in section.tables[0][1:]]
    assert named == [f"--{flag.name}" for flag in SECTIONS["this engine alone"]]
