"""The figures as text for a terminal."""

from __future__ import annotations

from typing import Any

from sd3.evaluation.names import HIGHER_IS_BETTER, TITLES

# Below this many prompts, or pairs where there is one prompt, an interval by resampling says little: of four, all four
# are on one side of 0 in one case of eight where there is no difference at all.
LEAST_UNITS = 10


def number(value: float, signed: bool = False) -> str:
    """Four significant digits or so, without an exponent where it can be had."""
    digits = 1 if abs(value) >= 1000 else 2 if abs(value) >= 10 else 3 if abs(value) >= 1 else 4
    return f"{value:{'+' if signed else ''}.{digits}f}"


def verdict(metric: str, difference: dict[str, Any]) -> str:
    """`better`, `worse`, or `unclear` where the interval holds 0; else why nothing can be said."""
    if difference["interval"] is None:
        return "no interval"
    if difference["units"] < LEAST_UNITS:
        return f"too few {difference['unit']}"
    low, high = difference["interval"]
    if low <= 0 <= high:
        return "unclear"
    return "better" if (low > 0) == HIGHER_IS_BETTER[metric] else "worse"


def cell(estimate: dict[str, Any], signed: bool = False) -> str:
    """A mean and its interval."""
    mean = number(estimate["mean"], signed)
    if estimate["interval"] is None:
        return mean
    low, high = (number(bound, signed) for bound in estimate["interval"])
    return f"{mean} [{low}, {high}]"


def table(results: dict[str, Any]) -> str:
    """Metrics in rows; candidates, then differences from the first one, in columns. Ends without a newline."""
    base = results["candidates"][0]["label"]
    heads = ["metric", "better", *(candidate["label"] for candidate in results["candidates"])]
    heads += [f"{difference['label']} - {base}" for difference in results["differences"]]
    rows = [heads]
    for metric in results["metrics"]:
        row = [TITLES[metric], "higher" if HIGHER_IS_BETTER[metric] else "lower"]
        row += [cell(candidate["metrics"][metric]) for candidate in results["candidates"]]
        for difference in results["differences"]:
            found = difference["metrics"][metric]
            row.append(f"{cell(found, signed=True)} {verdict(metric, found)}")
        rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
