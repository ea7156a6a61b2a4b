"""Everything that can be refused before anything heavy starts. Reads the run's settings as JSON on standard input.

Prints every problem as one sentence on standard error: the value, what was expected, what to do.
Exit status: 0 nothing found; 2 there are problems.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from pathlib import Path

from sd3.common.model_files import check_model, safetensors_parameters, weight_files
from sd3.common.preflight_data import check_dataset, check_folder


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


def check(settings: dict[str, str]) -> list[str]:
    """All problems of a run, one sentence each."""
    data = (
        check_folder(settings["input_dir"])
        if settings["input_dir"]
        else check_dataset(settings["dataset_name"], settings["caption_column"])
    )
    return [*check_model(settings["model_name"]), *data, *check_output(settings), *check_port(settings)]


def main() -> int:
    """Print the problems; returns the exit code."""
    problems = check(json.load(sys.stdin))
    for problem in problems:
        print(problem, file=sys.stderr)
    return 2 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
