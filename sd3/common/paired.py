"""Ways of doing the same, measured in alternation by processes of their own, and the ratios of the pairs."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sd3.common.command_line import UserError
from sd3.common.memory import GIVE_BACK

SPREAD = ("min", "median", "max")


@dataclass(frozen=True)
class Variant:
    """One of the ways: `kind` tells the child process what to do, `case` (a dataclass) what with; `short` is the case
    of the run in which its memory is measured on a CPU, None where the timed runs measure it."""

    kind: str
    case: Any
    short: Any = None


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
