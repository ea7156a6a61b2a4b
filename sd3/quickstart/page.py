"""The quick start's page: the subject, pictures before and after, the runs' plots and the figures, in one HTML file.

    python -m sd3.quickstart.page --subject-dir DIR --pictures NAME=DIR ... --run NAME=DIR ... --evaluation DIR
        --commands FILE --output FILE

The first of --pictures is the model before training; --run names the training run of the others.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sd3.common import pages
from sd3.common.command_line import Parser, UserError, status_of
from sd3.common.files import write_text
from sd3.common.pictures import picture_files, pictures_in
from sd3.evaluation.names import TITLES
from sd3.evaluation.table import number, verdict
from sd3.quickstart.figures import SUBJECT, Figure, world_figures

# What a picture of the subject is measured by, in words for somebody who reads of it for the first time.
MEANINGS = {
    "clip-t": "likeness to the prompt, in the eyes of a small CLIP of this world",
    "clip-i": "likeness to the five pictures, in the eyes of the same",
    "dino": "likeness to the five pictures, in the eyes of a small vision transformer",
}


def _picture(path: Path) -> str:
    return pages.data_address(path.read_bytes(), "image/png")


def _named(values: Sequence[str], option: str) -> dict[str, Path]:
    """NAME=DIR ... as a dictionary.

    Raises:
        UserError: a value has another form, or its directory is not there.
    """
    found = {}
    for value in values:
        name, _, folder = value.partition("=")
        if not name or not folder or not Path(folder).is_dir():
            raise UserError(f"{option} {value}: expected NAME=DIR with a directory that is there; name one.")
        found[name] = Path(folder)
    return found


def _prompts(folders: dict[str, Path]) -> list[dict[str, Any]]:
    """Each prompt with every model's pictures of it, in the order of their seeds.

    Raises:
        UserError: the folders do not hold pictures of the same prompts and seeds.
    """
    found: dict[str, dict[str, list[tuple[int, Path]]]] = {}
    for name, folder in folders.items():
        for path, recipe in pictures_in(folder):
            found.setdefault(recipe.prompt, {}).setdefault(name, []).append((recipe.seed, path))
    for prompt, by_name in found.items():
        seeds = {tuple(sorted(seed for seed, _ in pictures)) for pictures in by_name.values()}
        if len(by_name) < len(folders) or len(seeds) > 1:
            raise UserError(f"--pictures: '{prompt}' was not painted alike by all models; paint it with each of them.")
    return [
        {
            "prompt": prompt, "of_subject": SUBJECT in prompt,
            "models": [
                {"name": name, "pictures": [{"seed": seed, "data": _picture(path)} for seed, path in sorted(pictures)]}
                for name, pictures in by_name.items()
            ],
        }
        for prompt, by_name in sorted(found.items())
    ]  # fmt: skip


def _evaluation_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The evaluation script's metrics, a cell for each model."""
    rows = []
    for metric in results["metrics"]:
        judged = {one["label"]: verdict(metric, one["metrics"][metric]) for one in results["differences"]}
        cells = [
            {"text": number(one["metrics"][metric]["mean"]), "verdict": judged.get(one["label"], "")}
            for one in results["candidates"]
        ]
        rows.append({"title": TITLES[metric], "meaning": MEANINGS.get(metric, ""), "cells": cells})
    return rows


def _world_rows(folders: dict[str, Path]) -> list[dict[str, Any]]:
    """What the world's own readers say of the pictures, a cell for each model."""
    by_model: list[list[Figure]] = [world_figures(folder) for folder in folders.values()]
    return [
        {"title": same[0].title, "meaning": same[0].meaning,
         "cells": [{"text": f"{one.right} of {one.of}", "verdict": ""} for one in same]}
        for same in zip(*by_model, strict=True)
    ]  # fmt: skip


def _run(name: str, folder: Path) -> dict[str, Any]:
    """A run's plot and the three lines of its report.

    Raises:
        UserError: the directory holds no report.
    """
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        plot = _picture(folder / "report.png")
    except (OSError, ValueError):
        raise UserError(f"--run {name}={folder}: there is no report of a run; name a run directory.") from None
    return {"name": name, "plot": plot, **report}


def build(
    subject: Path, folders: dict[str, Path], runs: dict[str, Path], evaluation: Path, commands: Path
) -> str:
    """The page's HTML.

    Args:
        subject: folder with the pictures that were trained on, PNG.
        folders: pictures by name of the model, the one before training first; PNG with recipes.
        runs: run directories by name of the model.
        evaluation: what the evaluation script wrote for the same names.
        commands: text file with the commands that were run, one a line.

    Raises:
        UserError: something of these is missing, or the models did not paint the same prompts and seeds.
    """
    try:
        results = json.loads((evaluation / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"--evaluation {evaluation} holds no metrics.json; name what the evaluation wrote.") from None
    labels = [one["label"] for one in results["candidates"]]
    if labels != list(folders):
        raise UserError(
            f"--evaluation {evaluation} is of {', '.join(labels)}, --pictures of {', '.join(folders)}; give the same."
        )
    return pages.render(
        Path(__file__).with_name("quickstart.html.jinja"),
        subject=[_picture(path) for path in picture_files(subject)], names=list(folders), prompts=_prompts(folders),
        rows=_world_rows(folders) + _evaluation_rows(results), runs=[_run(*run) for run in runs.items()],
        commands=commands.read_text(encoding="utf-8").splitlines(),
    )  # fmt: skip


def write(arguments: Sequence[str] | None) -> None:
    """What the command line asks for; raises UserError and OSError."""
    parser: argparse.ArgumentParser = Parser(description="Write the quick start's page.")
    add = parser.add_argument
    add("--subject-dir", type=Path, required=True, metavar="DIR", help="the pictures that were trained on")
    add("--pictures", nargs="+", required=True, metavar="NAME=DIR", help="painted pictures, the model before first")
    add("--run", nargs="+", default=[], metavar="NAME=DIR", help="run directories")
    add("--evaluation", type=Path, required=True, metavar="DIR", help="output of sd3/evaluate_sd3.py for them")
    add("--commands", type=Path, required=True, metavar="FILE", help="the commands that were run, one a line")
    add("--output", type=Path, required=True, metavar="FILE", help="the page")
    options = parser.parse_args(arguments)
    folders, runs = _named(options.pictures, "--pictures"), _named(options.run, "--run")
    write_text(options.output, build(options.subject_dir, folders, runs, options.evaluation, options.commands))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return status_of(lambda: write(arguments))


if __name__ == "__main__":
    sys.exit(main())
