"""Builds emulated CANN, and installs torch_npu beside it, below build/tests/emulated_cann; prints how to use them.

    eval "$(python tests/emulated_cann/build.py)"     # CANN_SET_ENV, PYTHONPATH and the libraries of this shell

Needs g++, and torch of the version that requirements_sd3.txt pins. What is built is kept under a hash of its sources,
of Python and of the versions of torch and torch_npu.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parents[1]
BUILT = PROJECT / "build" / "tests" / "emulated_cann"
TABLE = HERE / "operators.tsv"
# torch_npu links to all of these; libopapi, which it loads by name, holds the operators.
OTHER_NAMES = ("hccl", "acl_op_compiler", "ge_runner", "graph", "acl_tdt_channel")
SET_ENV = """\
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
export ASCEND_TOOLKIT_HOME="$here" ASCEND_HOME_PATH="$here" ASCEND_OPP_PATH="$here/opp"
case ":${LD_LIBRARY_PATH:-}:" in
  *":$here/lib64:"*) ;;
  *) export LD_LIBRARY_PATH="$here/lib64${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" ;;
esac
"""


class Unavailable(RuntimeError):
    """Emulated CANN cannot be built here; the text says why."""


def npu_packages() -> list[str]:
    """torch_npu and what it imports, as requirements_sd3.txt pins them; of the others, those that are not there."""
    text = (PROJECT / "requirements_sd3.txt").read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if line.startswith("# npu: "))
    torch_npu, *others = line.removeprefix("# npu: ").split()
    return [torch_npu, *(package for package in others if not _installed(package.split("==")[0]))]


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def sources() -> list[Path]:
    """Everything that the libraries are made of."""
    return sorted([*HERE.glob("*/*.cpp"), *HERE.glob("*/*.h"), TABLE, HERE / "build.py"])


def folder() -> Path:
    """Where what belongs to these sources and versions is, or will be."""
    digest = hashlib.sha256()
    versions = (importlib.metadata.version("torch"), *npu_packages(), platform.machine(), sys.version)
    for part in (*(text.encode() for text in versions), *(path.read_bytes() for path in sources())):
        digest.update(hashlib.sha256(part).digest())
    return BUILT / digest.hexdigest()[:12]


def build(target: Path) -> None:
    """Make `target`: site/ with torch_npu, cann/ with the libraries and set_env.sh.

    Raises:
        Unavailable: there is no g++ or no wheel, torch is of another version, or the compiler fails.
    """
    _check_torch()
    if shutil.which("g++") is None:
        raise Unavailable("g++ is not installed")
    with tempfile.TemporaryDirectory(prefix=f"{target.name}-", dir=target.parent) as making:
        _install(Path(making) / "site")
        _compile(Path(making) / "cann")
        Path(making, "made").mkdir()
        for part in ("site", "cann"):
            Path(making, part).rename(Path(making, "made", part))
        Path(making, "made").rename(target)


def _check_torch() -> None:
    torch, torch_npu = importlib.metadata.version("torch"), npu_packages()[0].split("==")[1]
    if torch.split("+")[0] != ".".join(torch_npu.split(".")[:3]):
        raise Unavailable(f"torch_npu {torch_npu} does not go with torch {torch}")


def _install(site: Path) -> None:
    """Without dependencies: the x86_64 wheel asks for a build of torch that the package index does not have."""
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--target", str(site)]
    _run([sys.executable, "-m", "pip", "install", *options, *npu_packages()], "the package index has no torch_npu")


def _compile(cann: Path) -> None:
    libraries = cann / "lib64"
    for name in (libraries, *(cann / name for name in ("opp", "runtime", "compiler"))):
        name.mkdir(parents=True)
    torch = Path(importlib.util.find_spec("torch").origin).parent  # type: ignore[union-attr, arg-type]
    include = [f"-I{torch / 'include'}", f"-I{torch / 'include' / 'torch' / 'csrc' / 'api' / 'include'}"]
    flags = ["-shared", "-fPIC", "-std=c++17", "-O1", "-fvisibility=hidden", "-D_GLIBCXX_USE_CXX11_ABI=1"]
    compiler = ["g++", *flags, *include]
    runtime = sorted(str(path) for path in (HERE / "runtime").glob("*.cpp"))
    _run([*compiler, "-Wall", *runtime, "-pthread", "-o", str(libraries / "libascendcl.so")], "the runtime")
    for name in OTHER_NAMES:
        (libraries / f"lib{name}.so").symlink_to("libascendcl.so")
    # One translation unit: torch's headers take longer to read than all that is ours.
    whole = cann / "operators.cpp"
    parts = sorted((HERE / "operators").glob("*.cpp"))
    whole.write_text("".join(f'#include "{path}"\n' for path in parts), encoding="utf-8")
    link = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10", f"-L{libraries}", "-lascendcl", "-Wl,--no-as-needed"]
    output = ["-o", str(libraries / "libopapi.so")]
    _run([*compiler, str(whole), *link, "-Wl,--allow-shlib-undefined", *output], "the operators")
    shutil.copy(TABLE, libraries)
    (cann / "set_env.sh").write_text(SET_ENV, encoding="utf-8")


def _run(command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-40:]
        raise Unavailable(f"{what}: {command[0]} exited {done.returncode}:\n" + "\n".join(last))


def variables(built: Path, environment: dict[str, str]) -> dict[str, str]:
    """What a process needs in its environment beyond `environment`, as if it had sourced set_env.sh."""
    cann = built / "cann"

    def before(name: str, folder: Path) -> str:
        return os.pathsep.join([str(folder), *([environment[name]] if environment.get(name) else [])])

    return {
        "CANN_SET_ENV": str(cann / "set_env.sh"),
        "PYTHONPATH": before("PYTHONPATH", built / "site"),
        "LD_LIBRARY_PATH": before("LD_LIBRARY_PATH", cann / "lib64"),
        **dict.fromkeys(("ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH"), str(cann)),
        "ASCEND_OPP_PATH": str(cann / "opp"),
    }


def main() -> int:
    """Build where needed, print `export` lines; returns the exit status."""
    target = folder()
    try:
        if not target.is_dir():
            target.parent.mkdir(parents=True, exist_ok=True)
            build(target)
    except Unavailable as error:
        print(f"Emulated CANN cannot be built here: {error}", file=sys.stderr)
        return 3
    for name, value in variables(target, dict(os.environ)).items():
        print(f"export {name}={shlex.quote(value)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
