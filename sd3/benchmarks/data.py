"""What large training data cost at the start of a run: many large photographs, and very many small images."""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sd3.benchmarks.data_images import folder_of
from sd3.benchmarks.data_run import Case, Measured, run_case, start_once
from sd3.common.command_line import Parser, UserError
from sd3.common.paired import SPREAD, Variant, add_options, kept_in, measure, ratios, run_benchmark, shown
from sd3.common.run_environment import environment

FEW_PHOTOGRAPHS, FEW_SMALL = 5, 20  # what the many are compared with; the 5 are small images
# What the project wants to hold on two cores.
GOALS = {"second_ratio": 1.2, "first_extra_seconds": 0.08, "second_extra_seconds": 1.0}
GIB, SMALL_CACHE = 2**30, "small-precomputed"


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = Parser(
        description="Start a LoRA run of the native engine by its launcher, one step on the shipped tiny SD3 on the "
        "CPU, with many large photographs against 5 small images, and with very many small images against 20, in "
        "alternation; compare the seconds of the first and of the second run, and the memory."
    )
    add = parser.add_argument
    add("--photographs", type=int, default=100, help="images of 12 megapixels (default 100; 0: leave them out)")
    add("--small", type=int, default=20_000, help="images of 64x64 pixels (default 20000; 0: leave them out)")
    add("--keep", type=Path, metavar="DIR", help="keep the images here, and use those that are here")
    add_options(parser)
    return parser


def main(arguments: Sequence[str], script: Path) -> int:
    """Command line of `script`; returns the exit status."""

    def one_run(fields: dict[str, Any], _kind: str, folder: Path) -> Measured:
        return run_case(Case(**fields), folder)

    return run_benchmark(build_parser(), arguments, one_run, lambda options: compare(options, script), as_table)


def compare(options: argparse.Namespace, script: Path) -> dict[str, Any]:
    """Run everything that the options ask for; all that was found.

    Raises:
        UserError: an option makes no sense, images cannot be made, or a run failed.
    """
    _check(options)
    with kept_in(options.keep) as folder:
        try:
            cases = _cases(options, folder)
        except OSError as error:
            raise UserError(f"--keep={folder}: images cannot be made ({error}); name another directory.") from None
        runs = measure(script, {name: Variant("start", case) for name, case in cases.items()}, options.pairs)
    return {
        "photographs": options.photographs, "small": options.small, "pairs": options.pairs,
        "machine": {
            "processor": platform.processor() or platform.machine(), "cores": len(os.sched_getaffinity(0)),
            "threads": os.environ.get("OMP_NUM_THREADS"), **environment("cpu", "native"),
        },
        "goals": GOALS, "runs": runs, "figures": figures(runs, options.photographs, options.small),
    }  # fmt: skip


def _check(options: argparse.Namespace) -> None:
    """Raise UserError for numbers that make no sense."""
    if options.pairs < 1:
        raise UserError(f"--pairs={options.pairs} is too few; give 1 or more.")
    for name in ("photographs", "small"):
        if getattr(options, name) < 0:
            raise UserError(f"--{name}={getattr(options, name)} is below 0; give how many, or 0 to leave them out.")
    if not options.photographs and not options.small:
        raise UserError("--photographs=0 and --small=0 leave nothing to measure; give one of them.")


def _cases(options: argparse.Namespace, folder: Path) -> dict[str, Case]:
    """The cases by name, few images before many; the small images' latents are there when it returns."""
    cases = {}
    if options.photographs:
        cases[f"{FEW_PHOTOGRAPHS} images"] = Case(str(folder_of(folder, "small", FEW_PHOTOGRAPHS)))
        cases[f"{options.photographs} photographs"] = Case(str(folder_of(folder, "photographs", options.photographs)))
    for count in (FEW_SMALL, options.small) if options.small else ():
        case = Case(str(folder_of(folder, "small", count)), cache=str(folder / SMALL_CACHE))
        with tempfile.TemporaryDirectory() as scratch:
            start_once(case, Path(case.cache), Path(scratch) / "first")
        cases[f"{count} small images"] = case
    return cases


def figures(runs: dict[str, list[dict[str, Any]]], photographs: int, small: int) -> dict[str, dict[str, float]]:
    """What the goals are about, each as minimum, median and maximum over the pairs.

    `second_ratio`: second run with photographs over that with few images. `first_extra_seconds`: how much longer the
    first run takes, for each photograph. `second_extra_seconds`: how much longer the second run takes with very many
    small images.
    """
    found: dict[str, dict[str, float]] = {}
    if photographs:
        few, many = runs[f"{FEW_PHOTOGRAPHS} images"], runs[f"{photographs} photographs"]
        found["second_ratio"] = ratios(many, few, "seconds")
        found["first_extra_seconds"] = differences(many, few, "first_seconds", photographs)
    if small:
        few, many = runs[f"{FEW_SMALL} small images"], runs[f"{small} small images"]
        found["second_extra_seconds"] = differences(many, few, "seconds")
    return found


def differences(over: Sequence[dict], under: Sequence[dict], what: str, parts: int = 1) -> dict[str, float]:
    """Minimum, median and maximum, over the pairs, of `what` in the one run less `what` in the other, in `parts`."""
    values = [(one[what] - other[what]) / parts for one, other in zip(over, under, strict=True)]
    return dict(zip(SPREAD, (min(values), statistics.median(values), max(values)), strict=True))


def as_table(result: dict[str, Any]) -> str:
    """The figures as Markdown tables, which a terminal shows just as well."""
    lines = [
        f"One step of a LoRA, tiny SD3, 64x64, cpu, {result['machine']['cores']} cores, {result['pairs']} pairs; "
        "medians, of the first and of the second run",
        "",
        "| data | seconds | CPU seconds | peak memory, GiB |",
        "|---|---|---|---|",
    ]
    for name, runs in result["runs"].items():
        cells = (
            _first_and_second(runs, "seconds", 1), _first_and_second(runs, "cpu_seconds", 1),
            _first_and_second(runs, "bytes", 2, second="peak_bytes", unit=GIB),
        )  # fmt: skip
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| figure | min, median, max | goal, at most |", "|---|---|---|"]
    names = {
        "second_ratio": f"second run, {result['photographs']} photographs over {FEW_PHOTOGRAPHS} images",
        "first_extra_seconds": "first run, seconds more for each photograph",
        "second_extra_seconds": f"second run, seconds more with {result['small']} small images than with {FEW_SMALL}",
    }
    lines += [
        f"| {names[name]} | {shown(spread, 3)} | {result['goals'][name]:g} |"
        for name, spread in result["figures"].items()
    ]
    return "\n".join(lines)


def _first_and_second(runs: Sequence[dict], what: str, digits: int, second: str = "", unit: int = 1) -> str:
    """The medians of a first and of a second run; a dash where there was no first one."""
    first, later = (statistics.median(run[key] / unit for run in runs) for key in (f"first_{what}", second or what))
    return f"{f'{first:.{digits}f}' if first else '-'}, {later:.{digits}f}"
