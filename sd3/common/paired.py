"""Ways of doing the same, measured in alternation by processes of their own, and the ratios of the pairs."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sd3.common.command_line import UserError
from sd3.common.files import write_text
from sd3.common.memory import GIVE_BACK

SPREAD = ("min", "median", "max")


@dataclass(frozen=True)
class Variant:
    """One of the ways: `kind` tells the child process what to do, `case` (a dataclass) what with; `short` is the case
    of the run in which its memory is measured on a CPU, None where the timed runs measure it."""

    kind: str
    case: Any
    short: Any = None


def add_options(parser: argparse.ArgumentParser) -> None:
    """The flags of every such benchmark."""
    parser.add_argument("--pairs", type=int, default=3, help="paired runs (default 3)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a child's job: a kind, with the case on standard input


def run_benchmark(
    parser: argparse.ArgumentParser, arguments: Sequence[str], one_run: Callable[[dict[str, Any], str, Path], Any],
    compare: Callable[[argparse.Namespace], dict[str, Any]], as_table: Callable[[dict[str, Any]], str],
) -> int:  # fmt: skip
    """The whole command line; returns the exit status.

    `one_run` is what a child does: it gets the fields of a case, the kind and an empty directory, and returns a
    dataclass. `compare` runs the children, and what it found is printed by `as_table`.
    """
    try:
        options = parser.parse_args(arguments)
        if options.one:
            with tempfile.TemporaryDirectory() as folder:
                measured = one_run(json.load(sys.stdin), options.one, Path(folder))
            print(json.dumps(asdict(measured)))
            return 0
        if options.output:
            _check_output(options.output)  # before hours of measuring
        found = compare(options)
        print(as_table(found))
        if options.output:
            write_text(options.output, json.dumps(found, indent=2) + "\n")
        return 0
    except UserError as error:
        print(error, file=sys.stderr)
        return error.status


@contextlib.contextmanager
def kept_in(folder: Path | None) -> Iterator[Path]:
    """The directory that the user named, else one for only this run."""
    if folder is not None:
        yield folder.resolve()
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch)


def _check_output(file: Path) -> None:
    """Raise UserError where the figures could not be written to the file."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output={file}: its folder cannot be made ({error.strerror}); name another.") from None
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        raise UserError(f"--output={file} cannot be written; name a file in a folder that you may write.")


def back_and_forth(names: Sequence[str], pairs: int) -> Iterator[str]:
    """The names `pairs` times over, every second time backwards: a machine that slows down or warms up favours none."""
    for number in range(pairs):
        yield from names if number % 2 == 0 else reversed(names)


def measure(script: Path, variants: Mapping[str, Variant], pairs: int) -> dict[str, list[dict[str, Any]]]:
    """What the child processes of `script` measured, `pairs` runs of each variant by its name.

    Raises:
        UserError: a run failed.
    """
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    shorts = {name: variant for name, variant in variants.items() if variant.short is not None}
    with tqdm(total=pairs * len(variants) + len(shorts), desc="Runs") as bar:
        for name in back_and_forth(list(variants), pairs):
            bar.set_postfix_str(name)
            runs[name].append(_run_apart(script, name, variants[name].kind, variants[name].case))
            bar.update()
        for name, variant in shorts.items():
            bar.set_postfix_str(f"{name}, memory")
            peak = _run_apart(script, name, variant.kind, variant.short, **GIVE_BACK)["peak_bytes"]
            for run in runs[name]:
                run["peak_bytes"] = peak
            bar.update()
    return runs


def _run_apart(script: Path, name: str, kind: str, case: Any, **environment: str) -> dict[str, Any]:  # noqa: ANN401
    """`script --one=KIND` with the case on its standard input; the last line of its output is what it measured."""
    done = subprocess.run(
        [sys.executable, str(script), f"--one={kind}"], input=json.dumps(asdict(case)),
        capture_output=True, text=True, env={**os.environ, **environment},
    )  # fmt: skip
    if done.returncode:
        raise UserError(f"the run '{name}' failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}", 1)
    return json.loads(done.stdout.splitlines()[-1])


def ratios(over: Sequence[dict], under: Sequence[dict], what: str) -> dict[str, float]:
    """Minimum, median and maximum, over the pairs, of `what` in the one run over `what` in the other."""
    values = [one[what] / other[what] for one, other in zip(over, under, strict=True)]
    return dict(zip(SPREAD, (min(values), statistics.median(values), max(values)), strict=True))


def shown(spread: Mapping[str, float], digits: int) -> str:
    """Minimum, median and maximum for a cell of a table."""
    return ", ".join(f"{spread[key]:.{digits}f}" for key in SPREAD)
