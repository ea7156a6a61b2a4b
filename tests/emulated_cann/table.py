"""The table of operators as Markdown.

    python tests/emulated_cann/table.py             # print it
    python tests/emulated_cann/table.py --readme    # write it into both READMEs beside this file
"""

from __future__ import annotations

import sys
from itertools import groupby
from pathlib import Path

HERE = Path(__file__).resolve().parent
READMES = (HERE / "README.md", HERE / "README_zh.md")
BEGIN, END = "<!-- operators.tsv, by: python tests/emulated_cann/table.py --readme -->", "<!-- end of operators.tsv -->"
SHORT = {
    "FLOAT": "f32", "FLOAT16": "f16", "BFLOAT16": "bf16", "INT64": "i64", "INT32": "i32", "INT16": "i16", "INT8": "i8",
    "UINT8": "u8", "BOOL": "bool",
}  # fmt: skip


def rows() -> list[list[str]]:
    """Function, parameter, types, layout, source of every row of operators.tsv."""
    lines = (HERE / "operators.tsv").read_text(encoding="utf-8").splitlines()
    return [line.split("\t") for line in lines if line and not line.startswith("#")]


def markdown() -> str:
    """One line for each function: parameters that take the same are named together; `*` wants contiguous tensors."""
    lines = ["| function | takes | source |", "|---|---|---|"]
    for function, group in groupby(rows(), key=lambda row: row[0]):
        takes: dict[str, list[str]] = {}
        of_function = list(group)
        source = of_function[0][-1]
        for _, parameter, types, layout, _ in of_function:
            kinds = " ".join(SHORT[name] for name in types.split())
            takes.setdefault(kinds, []).append(parameter + ("" if layout == "strided" else "\\*"))
        told = "; ".join(f"{', '.join(names)}: {kinds}" for kinds, names in takes.items())
        lines.append(f"| {function} | {told} | {source} |")
    return "\n".join(lines)


def with_table(readme: str) -> str:
    """The README's text with the table between its two marks."""
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{markdown()}\n{END}{rest.split(END)[1]}"


def main() -> int:
    """Print the table, or write it into the READMEs; returns the exit status."""
    if sys.argv[1:] == ["--readme"]:
        for readme in READMES:
            readme.write_text(with_table(readme.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main())
