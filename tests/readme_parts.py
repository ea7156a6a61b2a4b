"""The few parts of a Markdown file that the documentation tests look at."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Section:
    """What stands under one heading, sub-headings not included."""

    level: int
    title: str
    code: list[str] = field(default_factory=list)
    tables: list[list[list[str]]] = field(default_factory=list)
    text: str = ""

    def code_pieces(self) -> list[str]:
        """Everything that is set as code: blocks, and inline pieces in text and tables."""
        cells = [cell for table in self.tables for row in table for cell in row]
        return [*self.code, *quoted(self.text), *(piece for cell in cells for piece in quoted(cell))]


def parse(path: Path) -> list[Section]:
    """The sections of a file in order."""
    sections: list[Section] = []
    fence: list[str] | None = None
    table: list[list[str]] | None = None
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.lstrip().startswith("```"):
            if fence is None:
                fence = []
            else:
                sections[-1].code.append("\n".join(fence))
                fence = None
            continue
        if fence is not None:
            fence.append(line)
            continue
        if heading := re.match(r"(#+) (.+)$", line):
            sections.append(Section(len(heading[1]), heading[2]))
            table = None
        elif line.startswith("|"):
            if table is None:
                table = []
                sections[-1].tables.append(table)
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))]
            if not all(re.fullmatch(r":?-+:?", cell) for cell in cells):
                table.append(cells)
        else:
            table = None
            sections[-1].text += line + "\n"
    return sections


def commands(code: str) -> str:
    """A code block without its comments, which are in the reader's language."""
    lines = (re.sub(r"\s+#.*$|^#.*$", "", line).rstrip() for line in code.splitlines())
    return "\n".join(line for line in lines if line)


def quoted(text: str) -> list[str]:
    """The pieces of inline code in a text without code blocks."""
    return re.findall(r"`([^`]+)`", text)


def anchor(title: str) -> str:
    """The anchor that a heading gets on the usual hosting sites."""
    kept = re.sub(r"[^\w\- ]", "", title.lower())
    return kept.strip().replace(" ", "-")


def links(text: str) -> list[str]:
    """Targets of the Markdown links in a text."""
    return re.findall(r"\]\(([^)\s]+)\)", text)
