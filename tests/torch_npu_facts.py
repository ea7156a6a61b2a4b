"""Records which public names a published torch_npu wheel has, by reading it: nothing of it is imported or run.

    python tests/torch_npu_facts.py                      # rewrite tests/data/torch_npu_names.json for its versions
    python tests/torch_npu_facts.py --version 2.7.1      # for these versions instead (repeatable)
    python tests/torch_npu_facts.py --check              # only compare; exit 1 on a difference

The wheels (about 40 MB each) are downloaded with pip, without their dependencies, into build/tests/wheels.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
FACTS = PROJECT / "tests" / "data" / "torch_npu_names.json"
WHEELS = PROJECT / "build" / "tests" / "wheels"
COMMAND = "python tests/torch_npu_facts.py"
# The modules a training or inference script may speak to. Everything else in the wheel is its own machinery.
MODULES = [
    "torch_npu",
    "torch_npu.npu",
    "torch_npu.npu.amp",
    "torch_npu.contrib",
    "torch_npu.contrib.transfer_to_npu",
    "torch_npu.optim",
    "torch_npu.profiler",
]


def download(version: str, cache: Path = WHEELS) -> Path:
    """The wheel of that version, from the cache or from the package index."""
    cache.mkdir(parents=True, exist_ok=True)
    found = sorted(cache.glob(f"torch_npu-{version}-*.whl"))
    if not found:
        # One fixed platform, so that the record does not depend on who makes it; the Python sources are common to all.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--implementation=cp", "--python-version=3.11"]
        command += ["--platform=manylinux_2_28_x86_64", "--platform=manylinux2014_x86_64"]
        subprocess.run([*command, "--dest", str(cache), f"torch_npu=={version}"], check=True)
        found = sorted(cache.glob(f"torch_npu-{version}-*.whl"))
    return found[0]


class Wheel:
    """The Python sources of one wheel."""

    def __init__(self, path: Path) -> None:
        with zipfile.ZipFile(path) as archive:
            files = [name for name in archive.namelist() if name.startswith("torch_npu/") and name.endswith(".py")]
            self.sources = {name: archive.read(name).decode("utf-8", "replace") for name in files}
        self._names: dict[str, set[str]] = {}

    def file_of(self, module: str) -> str | None:
        """The file that holds a module, or None where the wheel has no such module."""
        stem = module.replace(".", "/")
        return next((name for name in (f"{stem}/__init__.py", f"{stem}.py") if name in self.sources), None)

    def names(self, module: str) -> set[str]:
        """Public names that `module` binds at its top level, star imports followed, submodules included."""
        if module in self._names:
            return self._names[module]
        bound = self._names[module] = set()  # entered first: star imports may go round in a circle
        file = self.file_of(module)
        if file is None:
            return bound
        for node in ast.walk(ast.parse(self.sources[file])):
            if isinstance(node, ast.ImportFrom) and node.col_offset == 0:
                bound |= self._imported(node, module, file)
            elif isinstance(node, ast.Import) and node.col_offset == 0:
                bound |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.col_offset == 0:
                bound.add(node.name)
            elif isinstance(node, (ast.Assign, ast.AnnAssign)) and node.col_offset == 0:
                bound |= self._assigned(node)
        if file.endswith("__init__.py"):
            bound |= {found[1] for name in self.sources if (found := self._child(file, name))}
        self._names[module] = {name for name in bound if not name.startswith("_") or name == "__version__"}
        return self._names[module]

    @staticmethod
    def _child(file: str, name: str) -> re.Match[str] | None:
        return re.fullmatch(re.escape(file.removesuffix("__init__.py")) + r"(\w+)(?:/__init__)?\.py", name)

    def _imported(self, node: ast.ImportFrom, module: str, file: str) -> set[str]:
        base = node.module or ""
        if node.level:
            up = node.level - (1 if file.endswith("__init__.py") else 0)
            parts = module.split(".")
            base = ".".join([*parts[: len(parts) - up], *([base] if base else [])])
        if any(alias.name == "*" for alias in node.names):
            return set(self.names(base)) if base.startswith("torch_npu") else set()
        return {alias.asname or alias.name for alias in node.names}

    @staticmethod
    def _assigned(node: ast.Assign | ast.AnnAssign) -> set[str]:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        found = {target.id for target in targets if isinstance(target, ast.Name)}
        if found == {"__all__"} and isinstance(node.value, (ast.List, ast.Tuple)):
            found |= {item.value for item in node.value.elts if isinstance(item, ast.Constant)}
        return found

    def operators(self) -> set[str]:
        """Operators the wheel documents; it binds them in `torch_npu` when it is imported."""
        source = self.sources.get("torch_npu/_op_plugin_docs.py", "")
        return set(re.findall(r'_add_torch_npu_docstr\(\s*"(\w+)"', source))

    def is_torch_npu_module(self) -> bool:
        """Whether importing the wheel makes `torch.npu` another name of `torch_npu.npu`."""
        pattern = r"""_register_device_module\(\s*['"]npu['"]\s*,\s*torch_npu\.npu\s*\)"""
        return any(re.search(pattern, source) for source in self.sources.values())


def facts_of(version: str) -> dict[str, object]:
    """What the record holds for one version."""
    wheel = Wheel(download(version))
    names = {module: wheel.names(module) for module in MODULES if wheel.file_of(module)}
    names["torch_npu"] |= wheel.operators()
    lines = {module: textwrap.wrap(" ".join(sorted(found)), 110) for module, found in names.items()}
    return {"torch.npu is torch_npu.npu": wheel.is_torch_npu_module(), "names": lines}


def load() -> dict[str, dict[str, set[str]]]:
    """The recorded names: version -> module -> names. `torch.npu` is there where the wheel registers it."""
    recorded: dict[str, dict[str, set[str]]] = {}
    for version, facts in json.loads(FACTS.read_text(encoding="utf-8"))["versions"].items():
        names = {module: set(" ".join(lines).split()) for module, lines in facts["names"].items()}
        if facts["torch.npu is torch_npu.npu"]:
            names.update({module.replace("torch_npu.", "torch.", 1): found
                          for module, found in names.items() if module.startswith("torch_npu.npu")})
        recorded[version] = names
    return recorded


def main() -> int:
    """Rewrites or checks the record."""
    parser = argparse.ArgumentParser(description="Record the public names of published torch_npu wheels.")
    parser.add_argument("--version", action="append", help="version to record; default: those already recorded")
    parser.add_argument("--check", action="store_true", help="compare with the record, change nothing")
    args = parser.parse_args()
    versions = args.version or sorted(load())
    record = {"made with": COMMAND, "versions": {version: facts_of(version) for version in versions}}
    text = json.dumps(record, indent=1, sort_keys=True) + "\n"
    if args.check:
        if text == FACTS.read_text(encoding="utf-8"):
            return 0
        print(f"{FACTS} differs from the published wheels; run: {COMMAND}", file=sys.stderr)
        return 1
    FACTS.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
