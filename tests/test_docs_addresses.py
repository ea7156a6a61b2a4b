"""Both READMEs list every public address that the project's files contain, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from repository import PROJECT, relative, text_of, tracked_files

READMES = {"README.md": "Public addresses", "README_zh.md": "公网地址说明"}
ADDRESS = re.compile(r"https?://[^\s\"'`<>()\[\]{}|\\，。；、（）]+")
# Names reserved for examples and tests (RFC 2606, RFC 6761) and the machine itself lead nowhere public.
NOT_PUBLIC = re.compile(
    r"^https?://(?:[^/@]*@)?(?:localhost|127\.[\d.]+|0\.0\.0\.0|(?:[\w-]+\.)*(?:example|invalid|test)(?:\.\w+)?)(?:[:/]|$)"
)


def addresses(text: str) -> set[str]:
    """Public addresses in a text, without the punctuation that ends a sentence."""
    found = {match.rstrip(".,;:!?*_'\"…") for match in ADDRESS.findall(text)}
    return {address for address in found if not NOT_PUBLIC.match(address) and "$" not in address.split("/")[2]}


def table_of(readme: str) -> set[str]:
    """The addresses of the README's table."""
    text = (PROJECT / readme).read_text(encoding="utf-8")
    section = re.search(rf"^## {READMES[readme]}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert section, f"{readme} has no section '{READMES[readme]}'"
    return {found for row in re.findall(r"^\| .*$", section[1], re.MULTILINE) for found in addresses(row.split("|")[1])}


def in_project() -> dict[str, set[str]]:
    """Address -> the files that contain it, the READMEs' own tables aside."""
    found: dict[str, set[str]] = {}
    for path in tracked_files():
        name = relative(path)
        text = text_of(path)
        if name in READMES:
            text = re.sub(rf"^## {READMES[name]}\n.*?(?=^## |\Z)", "", text, flags=re.MULTILINE | re.DOTALL)
        for address in addresses(text):
            found.setdefault(address, set()).add(name)
    return found


@pytest.mark.parametrize("readme", READMES)
def test_every_address_is_listed(readme: str) -> None:
    listed = table_of(readme)
    missing = {address: sorted(files) for address, files in in_project().items() if address not in listed}
    assert not missing, f"not in the address table of {readme}"


@pytest.mark.parametrize("readme", READMES)
def test_no_listed_address_is_gone(readme: str) -> None:
    assert not table_of(readme) - set(in_project()), f"listed in {readme}, but in no file"


@pytest.mark.parametrize("readme", READMES)
def test_the_use_of_each_address_is_said(readme: str) -> None:
    text = Path(PROJECT / readme).read_text(encoding="utf-8")
    rows = [row for row in re.findall(r"^\| `https?://.*$", text, re.MULTILINE)]
    assert rows
    assert all(len(row.split("|")) == 4 and row.split("|")[2].strip() for row in rows)


def test_addresses_are_found_and_told_apart() -> None:
    text = "see <https" "://a.org/b>, (http" "://c.org). 'https://mirror.example/x' http://127.0.0.1:80 https://$HOST/x"
    assert addresses(text) == {"https" "://a.org/b", "http" "://c.org"}
