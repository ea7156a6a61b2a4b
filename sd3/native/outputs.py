"""The result of a run: a pipeline directory or a LoRA file, put in place when it is whole."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError

from sd3.common.command_line import UserError
from sd3.common.files import sync
from sd3.common.model_files import INDEX, PARTS, absent_parts
from sd3.common.trained_length import write_to_index
from sd3.common.weight_files import plain_folder
from sd3.native.model import Trained


def write_result(trained: Trained, model: Path, output: Path, dtype: torch.dtype) -> None:
    """Write what the run made into `output`; `model`: the pipeline directory that it came from.

    `dtype`: of a LoRA's weights, unless --upcast_before_saving keeps them in float32.

    Raises:
        UserError: it could not be written.
    """
    aside = output / ".result.partial"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        if not trained.lora:
            _copy_untrained(trained, model, aside)
        exact = trained.lora and trained.options.upcast_before_saving
        trained.write_weights(aside, None if exact else dtype)
        for path in aside.rglob("*"):
            sync(path)
        # The index goes first and comes last: with it the directory is a pipeline, and parts of two are none.
        (output / INDEX).unlink(missing_ok=True)
        sync(output)
        for path in sorted(aside.iterdir(), key=lambda path: path.name == INDEX):
            target = output / path.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(path, target)
        sync(output)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"the result could not be written to {output} ({error}); free some space and resume.", 1
        ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _copy_untrained(trained: Trained, model: Path, target: Path) -> None:
    """The parts that the run left as they were, their files byte for byte; weights under plain names."""
    listed = json.loads((model / INDEX).read_text(encoding="utf-8"))
    left_out = absent_parts(model) | set(trained.parts)
    for part in PARTS:
        if part in listed and part not in left_out and (model / part).is_dir():
            with plain_folder(model / part, trained.options.variant) as folder:
                shutil.copytree(folder, target / part)
    shutil.copyfile(model / INDEX, target / INDEX)
    write_to_index(target / INDEX, trained.options.max_sequence_length)
