"""Everything that can be refused before anything heavy starts, and a summary of the data that will be trained on.

Reads the run's settings as JSON on standard input; the arguments are the flags of the training script. Prints the
summary on standard output, the same as JSON to the descriptor whose number is in SD3_SUMMARY_FD, and every problem as
one sentence on standard error: the value, what was expected, what to do.
Exit status: 0 nothing found; 2 there are problems; 3 a package is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from sd3.common.command_line import UserError, one_line
from sd3.common.model_files import check_model
from sd3.common.safetensors_files import safetensors_parameters
from sd3.common.weight_files import weight_files
from sd3.data.summary import DataSummary
from sd3.native.options import NATIVE_ONLY, data_flags, notes_on, read


def existing_parent(path: Path) -> Path:
    """The nearest directory at or above path that is there."""
    return next(parent for parent in (path, *path.parents) if parent.exists())


def checkpoint_bytes(name: str, lora: bool) -> int:
    """Estimate of the disk space that one checkpoint and the final model take; 0 for a hub name.

    A full checkpoint holds the transformer and AdamW's two moments in fp32 (12 bytes a parameter); the final pipeline
    is about as large as the model directory. A LoRA takes little; 1 GiB is on the safe side.
    """
    root = Path(name)
    if not root.is_dir():
        return 0
    if lora:
        return 2**30 if any(root.glob("transformer/*-of-*")) else 2**28
    files, _ = weight_files(root / "transformer")
    parameters = sum(
        safetensors_parameters(file) if file.suffix == ".safetensors" else file.stat().st_size // 4 for file in files
    )
    return 12 * parameters + sum(file.stat().st_size for file in root.rglob("*") if file.is_file())


def check_output(settings: dict[str, str]) -> list[str]:
    """The run directory: can it be written, and does a checkpoint fit?"""
    run_dir = Path(settings["run_dir"])
    parent = existing_parent(run_dir)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        return [f"--output_dir={run_dir} cannot be written ({parent} is not yours to write in); name another."]
    try:
        needed = checkpoint_bytes(settings["model_name"], lora="lora" in settings["script"])
    except (OSError, ValueError, KeyError):
        return []  # the model's own check has said why
    free = shutil.disk_usage(parent).free
    if needed > free:
        return [
            f"--output_dir={run_dir}: {free / 2**30:.1f} GiB are free, and one checkpoint with the final model takes "
            f"about {needed / 2**30:.1f} GiB; free some space or name a directory on another disk."
        ]
    return []


def check_port(settings: dict[str, str]) -> list[str]:
    """The ranks' meeting port, on machine 0, which binds it; one process on a CPU needs none."""
    if int(settings["machine_rank"]) or int(settings["num_processors"]) * int(settings["num_machines"]) == 1:
        return []
    port = int(settings["main_process_port"])
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            return [f"--main_process_port={port} cannot be used ({error.strerror}); name a free port."]
    return []


def check_flags(settings: dict[str, str], options: argparse.Namespace, given: Sequence[str]) -> list[str]:
    """Flags after `--` that this engine or this device cannot follow."""
    problems = []
    if settings["engine"] == "diffusers":
        names = {argument.split("=", 1)[0].removeprefix("--") for argument in given}
        problems += [
            f"--{name} is an option of the native engine only; give --engine=native, or leave it out."
            for name in sorted(names & NATIVE_ONLY)
        ]
    if options.mixed_precision == "fp16" and settings["device"] == "cpu":
        problems.append(
            "--mixed_precision=fp16 cannot run on a CPU; use --mixed_precision=bf16 or --mixed_precision=no."
        )
    return problems


def check_training_data(
    settings: dict[str, str], options: argparse.Namespace, model: Path | None
) -> tuple[list[str], DataSummary | None]:
    """Problems with the data, and their summary; a data set on the hub is not downloaded for a dry run."""
    from sd3.data.check import CheckFlags, check_data

    dataset = options.dataset_name
    if dataset is not None and settings.get("dry_run") and not Path(dataset).exists():
        return [], None
    flags = CheckFlags(
        data=data_flags(options),
        resolution=options.resolution,
        instance_prompt=options.instance_prompt,
        max_sequence_length=options.max_sequence_length,
        model=model,
        class_folder=Path(options.class_data_dir) if options.with_prior_preservation else None,
        class_images=options.num_class_images,
        class_prompt=options.class_prompt or "",
        only_images=settings["engine"] == "diffusers",
        memory=options.precompute_dir,
    )
    return check_data(flags)


def check(settings: dict[str, str], given: Sequence[str]) -> tuple[list[str], DataSummary | None]:
    """All problems of a run with the flags `given`, one sentence each, and the summary of its data.

    Raises:
        UserError: a flag of the training script is unknown, out of range or contradicts another.
    """
    options = read("lora" if "lora" in settings["script"] else "full", given)
    of_model = check_model(settings["model_name"])
    model = Path(settings["model_name"])
    problems, summary = check_training_data(settings, options, model if model.is_dir() and not of_model else None)
    flags = check_flags(settings, options, given)
    if settings["engine"] == "diffusers":  # the native engine notes it by itself
        for note in notes_on(options):
            print(f"note: {note}", file=sys.stderr)
    return [*flags, *of_model, *problems, *check_output(settings), *check_port(settings)], summary


def main(given: Sequence[str]) -> int:
    """Print the problems and the summary; returns the exit code."""
    try:
        problems, summary = check(json.load(sys.stdin), given)
    except UserError as error:
        print(one_line(str(error)), file=sys.stderr)
        return error.status
    for problem in problems:
        print(one_line(problem), file=sys.stderr)
    if problems:
        return 2
    if summary is not None:
        sys.stdout.reconfigure(errors="backslashreplace")  # the terminal's encoding may not have all letters of a name
        for line in summary.lines():
            print(f"data: {one_line(line)}")
        if number := os.environ.get("SD3_SUMMARY_FD"):
            # What is left of a name that is not UTF-8 is spelled as JSON's own escapes.
            with os.fdopen(int(number), "w", encoding="utf-8", errors="backslashreplace") as stream:
                json.dump(summary.as_json(), stream, indent=2, ensure_ascii=False)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
