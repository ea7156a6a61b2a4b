"""Finds the project's own Python for a script that was started with another. Standard library only."""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
_GUARD = "SD3_REEXECUTED"


def project_python() -> Path | None:
    """The interpreter of the venv that setup_env.sh made, None where there is none."""
    remembered = PROJECT / "build" / "venv.path"
    venv = PROJECT / ".venv"
    if remembered.is_file() and (named := remembered.read_text(encoding="utf-8").split("\n")[0].strip()):
        venv = Path(named)
    python = venv / "bin" / "python"
    return python if os.access(python, os.X_OK) else None


def ensure(packages: Sequence[str]) -> None:
    """Return if all packages can be found; else run this script again in the project's venv, or exit with status 3."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if sys.version_info < (3, 10):  # noqa: UP036  # this very check is for older ones
        missing.insert(0, "Python 3.10 or later")
    if not missing:
        return
    python = project_python()
    # The venv's own interpreter is told by its prefix: its executable is a link to the one outside.
    inside = python is not None and Path(sys.prefix).resolve() == python.parent.parent.resolve()
    if python is None or inside or os.environ.get(_GUARD) == str(PROJECT):
        print(
            f"{sys.executable} lacks {', '.join(missing)}, and the project has no environment with it; "
            f"run: bash {shlex.quote(str(PROJECT / 'setup_env.sh'))}",
            file=sys.stderr,
        )
        raise SystemExit(3)
    print(f"{sys.executable} lacks {', '.join(missing)}: going on with {python}.", file=sys.stderr, flush=True)
    os.environ[_GUARD] = str(PROJECT)
    # What Python 3.10 and later keep of the command line holds the interpreter's own options too.
    arguments = getattr(sys, "orig_argv", [sys.executable, *sys.argv])[1:]
    os.execv(python, [str(python), *arguments])
