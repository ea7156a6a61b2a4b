"""The patched upstream scripts against our engine: paired runs in alternation, a table, JSON, and the bound."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sd3.common.command_line import Parser, UserError
from sd3.common.devices import DeviceError, detect
from sd3.common.files import write_text
from sd3.common.model_sizes import PATCH, SIZES, VAE_STRIDE, size_of
from sd3.common.paired import Variant, add_options, kept_in, measure, run_benchmark
from sd3.common.run_environment import environment
from sd3.common.synthetic_data import make_dog
from sd3.common.tiny_sd3 import make_tiny_sd3
from sd3.native.benchmark_figures import ENGINES, as_table, figures
from sd3.native.benchmark_run import CAPTION_COLUMN, FOLDERS, PROJECT, PROMPT, Case, Measured, run_case


class Usual(NamedTuple):
    """What a model is trained with where flags do not say."""

    size: str  # in SIZES
    resolution: int
    batch_size: int
    pictures: int


USUAL = {
    ("tiny", "full"): Usual("tiny", 64, 2, 4),
    ("tiny", "lora"): Usual("tiny", 64, 2, 4),
    ("proportional", "full"): Usual("proportional-1024", 128, 4, 32),
    ("proportional", "lora"): Usual("proportional-512", 128, 4, 32),
    ("sd3-medium", "full"): Usual("sd3-medium", 1024, 4, 32),
    ("sd3-medium", "lora"): Usual("sd3-medium", 512, 8, 32),
    ("sd3.5-large", "full"): Usual("sd3.5-large", 1024, 4, 32),
    ("sd3.5-large", "lora"): Usual("sd3.5-large", 512, 8, 32),
}
MODELS = tuple(dict.fromkeys(model for model, _ in USUAL))


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = Parser(
        description="Train the same model on the same pictures with the patched upstream scripts and with the native "
        "engine, in alternation, each run in a process of its own, and compare time and memory of the steps."
    )
    add = parser.add_argument
    add(
        "--model", default="proportional", choices=MODELS,
        help="random weights of this size; proportional (default): SD3 medium's shares of VAE, text encoders and "
        "transformer at the resolution of the case, in a model that two cores can run; the largest two take 15 and "
        "28 GB on the disk and 40 GB of host memory to make",
    )  # fmt: skip
    add("--case", default="lora", choices=("full", "lora"), help="full fine-tuning at 1024, or LoRA at 512 (default)")
    add("--captions", default="each", choices=("each", "one"), help="one for each picture (default), or one for all")
    add("--device", default="auto", choices=("auto", "npu", "cuda", "cpu"), help="where to train")
    add("--precision", choices=("no", "fp16", "bf16"), help="mixed precision (default bf16, on a cpu no)")
    add("--steps", type=int, default=5, help="measured steps of a run (default 5)")
    add("--warm-up", type=int, default=2, help="steps before them (default 2)")
    add("--batch-size", type=int, help="pictures in a batch (default 4; a large model's LoRA 8, tiny 2)")
    add("--pictures", type=int, help="pictures to train on, a multiple of the batch (default 32, tiny 4)")
    add("--resolution", type=int, help="pixels a side (default 1024 full, 512 LoRA; proportional has its own)")
    add(
        "--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=None,
        help="recompute activations (default: in full fine-tuning)",
    )  # fmt: skip
    add("--keep", type=Path, metavar="DIR", help="keep model and pictures here, and use those that are here")
    add_options(parser)
    return parser


def main(arguments: Sequence[str], script: Path) -> int:
    """Command line of `script`; returns the exit status."""

    def one_run(fields: dict[str, Any], engine: str, folder: Path) -> Measured:
        return run_case(Case(**fields), engine, folder)

    return run_benchmark(build_parser(), arguments, one_run, lambda options: compare(options, script), as_table)


def compare(options: argparse.Namespace, script: Path) -> dict[str, Any]:
    """Run both engines as the options say; everything that was found.

    Raises:
        UserError: an option makes no sense, the patched scripts are not there, or a run failed.
    """
    case, size_name = plan(options)
    _check_upstream()
    with kept_in(options.keep) as folder:
        model = _model(folder, size_name)
        case = dataclasses.replace(case, model=str(model), data=str(_pictures(folder, case)))
        # On a CPU memory has a run of its own; from the second step on it holds the optimizer's moments too.
        short = dataclasses.replace(case, warm_up=1, steps=1) if case.device == "cpu" else None
        runs = measure(script, {engine: Variant(engine, case, short) for engine in ENGINES}, options.pairs)
    if len({run["threads"] for found in runs.values() for run in found}) > 1:
        raise UserError("the engines ran with different numbers of threads; set OMP_NUM_THREADS.", 1)
    about = environment(case.device, "diffusers")
    return {
        "model": size_name,
        "case": {name: value for name, value in dataclasses.asdict(case).items() if name not in ("model", "data")},
        "machine": {"processor": platform.processor() or platform.machine(), **about},
        "runs": runs,
        "figures": figures(SIZES[size_name], case, runs),
    }


def plan(options: argparse.Namespace) -> tuple[Case, str]:
    """The case that the options ask for, model and pictures still to be made, and the size of its model.

    Raises:
        UserError: an option makes no sense.
    """
    usual = USUAL[options.model, options.case]
    size = SIZES[usual.size]
    try:
        device = detect(options.device)
    except DeviceError as error:
        raise UserError(str(error)) from None
    given = {
        "resolution": options.resolution, "batch_size": options.batch_size, "pictures": options.pictures,
        "checkpointing": options.gradient_checkpointing, "precision": options.precision,
    }  # fmt: skip
    usually = usual._asdict() | {
        "checkpointing": options.case == "full",
        "precision": "no" if device == "cpu" else "bf16",
    }
    case = Case(
        model="", data="", kind=options.case, captions=options.captions, device=device, warm_up=options.warm_up,
        steps=options.steps, **{name: usually[name] if value is None else value for name, value in given.items()},
    )  # fmt: skip
    for name in ("pairs", "steps", "warm_up", "batch_size", "pictures"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}={value} is too few; give 1 or more.")
    if case.resolution != usual.resolution and options.model == "proportional":
        raise UserError(
            f"--resolution={case.resolution}: a proportional model has its proportions at {usual.resolution}; leave "
            "the option out, or choose another --model."
        )
    largest = size.positions * PATCH * VAE_STRIDE
    if case.resolution % (PATCH * VAE_STRIDE) or not 64 <= case.resolution <= largest:
        raise UserError(f"--resolution={case.resolution} is no multiple of 16 from 64 to {largest}; give such a one.")
    if case.pictures % case.batch_size:
        # The upstream scripts end an epoch with a smaller batch.
        raise UserError(
            f"--pictures={case.pictures} is no multiple of the batch of {case.batch_size}; give one, so that both "
            "engines train on full batches."
        )
    if device == "cpu" and case.precision == "fp16":
        raise UserError("--precision=fp16: accelerate refuses it on a CPU; use no or bf16.")
    return case, usual.size


def _check_upstream() -> None:
    """Raise UserError where the patched scripts are not as they should be."""
    checkout = PROJECT / "build" / "diffusers"
    done = subprocess.run(
        ["bash", "-c", '. "$1"; queue_source_ok "$2"', "bash", str(PROJECT / "patches" / "lib.sh"), str(checkout)],
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode or not FOLDERS["upstream"].is_dir():
        why = (done.stderr.strip().splitlines() or ["patches: unknown"])[0].removeprefix("patches: ").rstrip(".")
        raise UserError(f"The patched upstream scripts are missing ({why}); run: bash setup_env.sh", 3)


def _model(folder: Path, size_name: str) -> Path:
    """A pipeline with random weights in float16, as the published ones are; made if it is not there.

    Raises:
        UserError: what is there has another size, or none can be made.
    """
    model = folder / f"model-{size_name}"
    try:
        if not model.exists():
            with contextlib.redirect_stdout(sys.stderr):  # standard output is the table's; libraries speak up here
                make_tiny_sd3(model, size=size_name, half=True)
        found = size_of({part.name: part for part in model.iterdir()})
    except (OSError, KeyError) as error:
        raise UserError(f"--keep: {model} cannot be made or read ({error}); name another directory.") from None
    if dataclasses.replace(found, t5_rows=0) != dataclasses.replace(SIZES[size_name], t5_rows=0):
        raise UserError(f"--keep: {model} is of another size than {size_name}; remove it.")
    return model


def _pictures(folder: Path, case: Case) -> Path:
    """A folder of pictures, with a caption for each where the case wants that; made if it is not there."""
    data = folder / f"pictures-{case.pictures}-{case.resolution}-{case.captions}"
    rows = [
        {"file_name": f"{number:02d}.png", CAPTION_COLUMN: f"{PROMPT}, picture {number}"}
        for number in range(case.pictures)
    ]
    try:
        if not data.exists():
            make_dog(data, images=case.pictures, size=case.resolution)
        if case.captions == "each":
            write_text(data / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    except OSError as error:
        raise UserError(f"--keep: {data} cannot be made ({error}); name another directory.") from None
    return data
