"""Every torch_npu name the project's code uses exists in the published wheel of each version that set-up installs.

No NPU is needed: names are collected from the sources and looked up in a record of the wheels' public names, made by
tests/torch_npu_facts.py.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from repository import PROJECT, relative, text_of, tracked_files
from torch_npu_facts import load

FACTS = load()
ROOTS = ("torch_npu", "torch.npu")
NAME = re.compile(r"\b(?:torch_npu|torch\.npu)(?:\.[A-Za-z_]\w*)+")
PIN = re.compile(r"torch[-_]npu==\s*([0-9][\w.]*)")


def dotted(node: ast.AST) -> str | None:
    """`a.b.c` for a chain of plain attributes, else None."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else None


def names_in_python(source: str) -> set[str]:
    """Dotted torch_npu and torch.npu names in Python code, seen through `import ... as` and plain assignments."""
    tree = ast.parse(source)
    aliases: dict[str, str] = {}
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for item in node.names:
                if item.asname:
                    aliases[item.asname] = item.name
                found.add(item.name)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for item in node.names:
                aliases[item.asname or item.name] = f"{node.module}.{item.name}"
                found.add(f"{node.module}.{item.name}")
        elif isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            value = dotted(node.value)
            if value in ROOTS:
                aliases[node.targets[0].id] = value
    for node in ast.walk(tree):
        chain = dotted(node) if isinstance(node, ast.Attribute) else None
        if chain:
            head, _, rest = chain.partition(".")
            found.add(f"{aliases.get(head, head)}.{rest}")
        elif (
            isinstance(node, ast.Call)
            and dotted(node.func) == "getattr"
            and len(node.args) > 1
            and isinstance(node.args[1], ast.Constant)
            and (owner := dotted(node.args[0])) in ROOTS
        ):
            found.add(f"{owner}.{node.args[1].value}")
    return {name for name in found if name.startswith(tuple(f"{root}." for root in ROOTS))}


def names_in_text(text: str, patch: bool = False) -> set[str]:
    """The same in shell code (which calls Python in strings), or in the lines that a patch adds."""
    lines = text.splitlines()
    if patch:
        lines = [line[1:] for line in lines if line.startswith("+") and not line.startswith("+++")]
    return {name for line in lines for name in NAME.findall(line)}


def missing(name: str, facts: dict[str, set[str]]) -> str | None:
    """What of a dotted name does not exist, or None. Attributes of classes and functions are not followed."""
    parts = name.split(".")
    start = 2 if name.startswith("torch.npu") else 1
    for length in range(start, len(parts)):
        module, attribute = ".".join(parts[:length]), parts[length]
        if module not in facts:
            return None if length > start else module
        if attribute not in facts[module]:
            return f"{module}.{attribute}"
    return None


def used() -> dict[str, set[str]]:
    """Names by file, over the project's own code."""
    found: dict[str, set[str]] = {}
    for path in tracked_files():
        name = relative(path)
        if name.startswith("tests/"):
            continue
        if path.suffix == ".py":
            found[name] = names_in_python(text_of(path))
        elif path.suffix == ".sh":
            found[name] = names_in_text(text_of(path))
        elif path.suffix == ".patch":
            found[name] = names_in_text(text_of(path), patch=True)
    return found


def pins() -> set[str]:
    """The torch_npu versions that set-up may install."""
    files = [p for p in tracked_files() if p.parent == PROJECT and p.suffix in {".txt", ".sh"}]
    return {version for path in files for version in PIN.findall(text_of(path))}


def test_every_pinned_version_is_recorded() -> None:
    assert pins(), "no torch_npu pin found in the requirement files or setup_env.sh"
    assert pins() == set(FACTS), "record them: python tests/torch_npu_facts.py --version VERSION ..."


@pytest.mark.parametrize("version", sorted(FACTS))
def test_every_name_exists(version: str) -> None:
    assert sum(len(names) for names in used().values()) > 0, "no torch_npu name was found: the collector is broken"
    absent = {
        f"{file}: {gone}" for file, names in used().items() for name in names if (gone := missing(name, FACTS[version]))
    }
    assert not absent


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.npu.no_such_name()",
        "import torch_npu as t\nt.npu.no_such_name",
        "from torch_npu.npu import no_such_name",
        "import torch\nnpu = torch.npu\nnpu.no_such_name()",
        "import torch\ngetattr(torch.npu, 'no_such_name')",
    ],
)
def test_a_wrong_name_is_seen_in_python(source: str) -> None:
    gone = [missing(name, facts) for name in names_in_python(source) for facts in FACTS.values()]
    assert any(name and name.endswith("no_such_name") for name in gone)


def test_a_wrong_name_is_seen_in_shell_and_patches() -> None:
    assert names_in_text("python -c 'import torch_npu; torch_npu.npu.gone()'") == {"torch_npu.npu.gone"}
    assert names_in_text("+x = torch.npu.gone()\n-y = torch.npu.old()\n", patch=True) == {"torch.npu.gone"}
    assert missing("torch_npu.npu.gone", FACTS[max(FACTS)]) == "torch_npu.npu.gone"
    assert missing("torch.npu.Stream.wait_event", FACTS[max(FACTS)]) is None


@pytest.mark.long
def test_the_record_is_what_the_published_wheels_hold() -> None:
    subprocess.run([sys.executable, str(Path(__file__).with_name("torch_npu_facts.py")), "--check"], check=True)
