"""The command line: flags, their defaults, and everything that can be refused before anything heavy starts."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from sd3.common.command_line import Parser, UserError
from sd3.evaluation.candidates import Candidate, parse_candidate
from sd3.evaluation.names import METRICS
from sd3.evaluation.prompts import class_noun_of

# Handed to the inference code with their values; a flag that is not given keeps the default there.
PAINTING = ("steps", "guidance_scale", "height", "width", "dtype", "max_sequence_length")
NEEDS = {
    "clip-i": ("subject_dir", "--subject-dir"),
    "dino": ("subject_dir", "--subject-dir"),
    "kid": ("references", "--reference-dir or --dataset"),
    "fid": ("references", "--reference-dir or --dataset"),
}


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What sd3/evaluate_sd3.py sets at its top."""

    clip_model: str
    dino_model: str
    kid_model: str
    prompt_set: str
    subject: str
    seeds: Sequence[int]
    output_dir: str


def build_parser(defaults: Defaults) -> argparse.ArgumentParser:
    """All flags."""
    parser = Parser(
        description="Compare pictures of a base model and of fine-tuned ones: CLIP-T, CLIP-I, DINO, KID, FID.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=120),
    )  # fmt: skip
    compared = parser.add_argument_group("what is compared")
    add = compared.add_argument
    add("--pictures", nargs="+", type=Path, default=[], metavar="DIR", help="folders that the inference scripts filled")
    add("--label", nargs="+", default=[], metavar="NAME", help="a name for each of them (default: the folder's own)")
    add("--candidate", action="append", default=[], metavar="SPEC",
        help="paint with a model: label=NAME,model=DIR_OR_HUB_NAME[,lora=FILE]; may be repeated")  # fmt: skip
    add("--base", metavar="NAME", help="the one that others are compared with (default: the first folder or candidate)")

    against = parser.add_argument_group("what it is compared with")
    add = against.add_argument
    add("--subject-dir", type=Path, metavar="DIR", help="real pictures of the subject, for CLIP-I and DINO")
    add("--reference-dir", type=Path, metavar="DIR", help="real pictures, for KID and FID")
    add("--dataset", type=Path, metavar="DIR",
        help="captioned data set (data/*.parquet): prompts and reference pictures are its held-out rows")  # fmt: skip
    add("--caption-column", metavar="NAME", help="its column with the captions (default text)")
    add("--held-out", type=float, metavar="FRACTION", help="how much of it is held out (default 0.1)")
    add("--split-seed", type=int, metavar="N", help="which rows are held out (default 0)")
    add("--training-split", type=Path, metavar="DIR",
        help="write the rows that are not held out to this directory, to train on, and stop")  # fmt: skip

    painting = parser.add_argument_group("painting, for candidates")
    add = painting.add_argument
    add("--prompt-set", metavar="SET", help="object, live-subject, or a text file with a prompt on each line "
        f"(default {defaults.prompt_set})")  # fmt: skip
    add("--seeds", nargs="+", type=int, metavar="N", help="a picture of each prompt for each seed "
        f"(default {' '.join(map(str, defaults.seeds))})")  # fmt: skip
    add("--steps", metavar="N", help="denoising steps (default: as in the inference scripts, also for the next four)")
    add("--guidance-scale", metavar="X", help="classifier-free guidance; 1 is without")
    add("--height", metavar="N", help="height in pixels, a multiple of 16")
    add("--width", metavar="N", help="width in pixels, a multiple of 16")
    add("--dtype", choices=("float16", "bfloat16", "float32"), help="precision of painting; features are float32")
    add("--max-sequence-length", metavar="N", help="tokens that T5 reads of a prompt, 77 to 512 (default: of each "
        "candidate as it was trained, else 256)")  # fmt: skip
    add("--painting-batch-size", type=int, metavar="N", help="pictures painted at once (default 1)")

    measuring = parser.add_argument_group("measuring")
    add = measuring.add_argument
    add("--metrics", metavar="LIST", help="of clip-t,clip-i,dino,kid,fid (default: all that the inputs allow)")
    add("--subject", metavar="TEXT", default=defaults.subject, help="what {subject} in a prompt becomes "
        f"(default '{defaults.subject}')")  # fmt: skip
    add("--class-noun", metavar="TEXT", help="what CLIP-T reads in its place (default: without its first word)")
    add("--clip-model", default=defaults.clip_model, metavar="NAME", help="CLIP model of transformers, directory or "
        f"hub name (default {defaults.clip_model})")  # fmt: skip
    add("--dino-model", default=defaults.dino_model, metavar="NAME", help="vision transformer with a class token "
        f"(default {defaults.dino_model})")  # fmt: skip
    add("--kid-model", default=defaults.kid_model, metavar="NAME", help="inception-v3 (torchvision's), a file of its "
        f"weights, or a vision transformer (default {defaults.kid_model})")  # fmt: skip
    add("--resamples", type=int, default=2000, metavar="N", help="of the bootstrap (default 2000)")

    running = parser.add_argument_group("running")
    add = running.add_argument
    add("--output-dir", type=Path, default=Path(defaults.output_dir), metavar="DIR",
        help=f"where metrics.json and report.html go (default {defaults.output_dir})")  # fmt: skip
    add("--cache-dir", type=Path, metavar="DIR", help="where features are kept (default .features in --output-dir)")
    add("--batch-size", type=int, default=32, metavar="N", help="pictures measured at once (default 32)")
    add("--device", default="auto", choices=("auto", "npu", "cuda", "cpu"),
        help="where to paint and to measure (default auto: npu, then cuda, then cpu)")  # fmt: skip
    add("--local-files-only", action="store_true", help="never ask the hub")
    return parser


def parse(arguments: Sequence[str], defaults: Defaults) -> argparse.Namespace:
    """Flags, checked, with defaults filled in; `candidates`, `metrics` (names), `omitted` (notes) and `painting_flags`.

    Raises:
        UserError: a value is wrong, or something that was asked for lacks its input.
    """
    options = build_parser(defaults).parse_args(list(arguments))
    _check_numbers(options)
    _check_data_set(options)
    options.class_noun = class_noun_of(options.subject) if options.class_noun is None else options.class_noun
    if options.training_split:
        return options
    options.candidates = _candidates(options)
    _check_painting(options)
    options.prompt_set = options.prompt_set or ("" if options.dataset else defaults.prompt_set)
    options.seeds = list(dict.fromkeys(options.seeds or defaults.seeds))
    options.painting_flags = [
        f"--{name.replace('_', '-')}={value}"
        for name in PAINTING
        if name != "dtype" and (value := getattr(options, name)) is not None
    ]
    options.metrics, options.omitted = _metrics(options)
    options.cache_dir = options.cache_dir or options.output_dir / ".features"
    return options


def _check_numbers(options: argparse.Namespace) -> None:
    least = {"batch_size": 1, "painting_batch_size": 1, "resamples": 100}
    for name, minimum in least.items():
        value = getattr(options, name)
        if value is not None and value < minimum:
            raise UserError(f"--{name.replace('_', '-')}={value} is too small; give at least {minimum}.")
    if options.held_out is not None and not 0 < options.held_out < 1:
        raise UserError(f"--held-out={options.held_out:g} is out of range; give a fraction above 0 and below 1.")
    if bad := [seed for seed in options.seeds or [] if not 0 <= seed < 2**64]:
        raise UserError(f"--seeds: {bad[0]} is out of range; give whole numbers from 0 to 2**64 - 1.")


def _check_data_set(options: argparse.Namespace) -> None:
    """A flag that only means something with another one is refused without it."""
    if options.dataset is None:
        for name in ("caption_column", "held_out", "split_seed", "training_split"):
            if getattr(options, name) is not None:
                raise UserError(f"--{name.replace('_', '-')} is about a data set; give --dataset too, or leave it out.")
    elif options.prompt_set is not None:
        raise UserError(
            f"--prompt-set={options.prompt_set} and --dataset={options.dataset} exclude each other: the captions are "
            "the prompts; leave one out."
        )
    elif options.reference_dir is not None:
        raise UserError(
            f"--reference-dir={options.reference_dir} and --dataset={options.dataset} exclude each other: the held-out "
            "pictures are the reference; leave one out."
        )
    options.caption_column = options.caption_column or "text"
    options.held_out = 0.1 if options.held_out is None else options.held_out
    options.split_seed = options.split_seed or 0


def _candidates(options: argparse.Namespace) -> list[Candidate]:
    if options.label and len(options.label) != len(options.pictures):
        raise UserError(
            f"--label has {len(options.label)} names and --pictures {len(options.pictures)} folders; "
            "give one name for each folder."
        )
    labels = options.label or [path.resolve().name for path in options.pictures]
    found = [Candidate(label, folder=path) for label, path in zip(labels, options.pictures, strict=True)]
    found += [parse_candidate(text) for text in options.candidate]
    if not found:
        raise UserError("nothing to compare; give --pictures DIR or --candidate label=NAME,model=DIR.")
    names = [candidate.label for candidate in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"the label '{twice[0]}' is there twice; give each candidate its own with --label or label=.")
    options.base = options.base or names[0]
    if options.base not in names:
        raise UserError(f"--base={options.base} is none of the candidates; give one of {', '.join(names)}.")
    return found


def _check_painting(options: argparse.Namespace) -> None:
    if options.candidate:
        return
    for name in (*PAINTING, "seeds", "prompt_set", "painting_batch_size"):
        if getattr(options, name) is not None:
            raise UserError(
                f"--{name.replace('_', '-')} is for pictures that are painted here, and no --candidate is given; "
                "leave it out."
            )


def _metrics(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Names of the metrics, and a note for each that is left out for want of its input."""
    options.references = options.reference_dir or options.dataset
    if options.metrics is None:
        lacking = {name: NEEDS[name][1] for name in NEEDS if getattr(options, NEEDS[name][0]) is None}
        notes = [f"{name} was left out: it needs {flag}." for name, flag in lacking.items()]
        return [name for name in METRICS if name not in lacking], notes
    asked = [name.strip() for name in options.metrics.split(",")]
    for name in asked:
        if name not in METRICS:
            raise UserError(f"--metrics: '{name}' is not known; give some of {','.join(METRICS)}.")
        if name in NEEDS and getattr(options, NEEDS[name][0]) is None:
            raise UserError(f"--metrics: {name} needs {NEEDS[name][1]}; give it, or leave {name} out.")
    return [name for name in METRICS if name in asked], []
