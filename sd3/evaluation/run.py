"""An evaluation from checked flags to files."""

from __future__ import annotations

import argparse
import json
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import transformers

from sd3.common.command_line import make_output_dir
from sd3.common.devices import detect
from sd3.common.files import write_text
from sd3.evaluation.candidates import unequal_settings
from sd3.evaluation.inputs import check_models, gather, read_references
from sd3.evaluation.measure import Request, measure
from sd3.evaluation.painting import Inference
from sd3.evaluation.prompts import text_for_clip
from sd3.evaluation.report import write_report
from sd3.evaluation.results import summarize
from sd3.evaluation.table import table


def evaluate(options: argparse.Namespace, inference: Inference) -> dict[str, Any]:
    """Gather the pictures, measure them, write metrics.json and report.html, print the table; returns the figures.

    Raises:
        UserError, DeviceError, GenerationFailed: the text says what is wrong; the last one has said it already.
    """
    _quiet()
    device = detect(options.device)
    check_models(options)
    references = read_references(options)
    make_output_dir(options.output_dir)
    sets = gather(options, references.split, device, inference)
    text_of = partial(text_for_clip, subject=options.subject, class_noun=options.class_noun)
    request = Request(
        metrics=options.metrics, subject=references.subject, references=references.images, text_of=text_of,
        clip_model=options.clip_model, dino_model=options.dino_model, kid_model=options.kid_model, device=device,
        batch_size=options.batch_size, local_files_only=options.local_files_only,
    )  # fmt: skip
    measured = measure(sets, request, options.cache_dir)
    captions = references.split.captions if references.split else None
    results = summarize(sets, measured, options.metrics, text_of, options.resamples, captions)
    generated = [note.removeprefix("note: ") for note in inference.notes]
    results["notes"] = [*generated, *unequal_settings(sets), *results["notes"], *options.omitted]
    results["settings"] = {
        "device": device, "subject": options.subject, "class_noun": options.class_noun, "seeds": sets[0].seeds(),
        "resamples": options.resamples, "subject_pictures": [source.name for source in references.subject],
        "reference_pictures": len(references.images), "reference_dir": _text(options.reference_dir),
    }  # fmt: skip
    results["split"] = references.describe_split()
    write_text(options.output_dir / "metrics.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    write_report(options.output_dir / "report.html", results, sets, references.subject)
    print(table(results))
    for note in results["notes"][len(generated) :]:  # those were printed before the images were made
        print(f"note: {note}")
    print(f"written: {options.output_dir / 'metrics.json'} {options.output_dir / 'report.html'}")
    return results


def _quiet() -> None:
    """Keep to ourselves what the libraries say to those who train, of heads that are new."""
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
