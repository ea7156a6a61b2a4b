"""The state of a run, written to and read from a checkpoint: safetensors and JSON, so that reading executes nothing.

Only DeepSpeed writes and reads its own partitioned state, which it pickles. Such a checkpoint is trusted input: its
manifest is checked first, but whoever can write the directory can write the manifest.
"""

from __future__ import annotations

import argparse
import errno
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sd3.common.command_line import UserError
from sd3.native import checkpoint_files
from sd3.native.flag_changes import differences, remembered
from sd3.native.model import Trained, trainable

logger = logging.getLogger(__name__)
STATE = "state.json"
OPTIMIZER = "optimizer.safetensors"
DEEPSPEED = "deepspeed"
LORA = "pytorch_lora_weights.safetensors"
FORMAT = 2
FACTS = {
    "format": int, "kind": str, "deepspeed": bool, "ranks": int, "step": int, "position": int, "seed": int, "data": str,
    "flags": dict, "schedule": dict,
}  # fmt: skip
UNREADABLE = "{} cannot be read ({} is not what this engine writes); resume from another checkpoint."


def pack(state: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """An optimizer's state_dict as tensors by name, and the rest as JSON can hold it."""
    tensors, rest = {}, {}
    for number, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{number}.{name}"] = value.detach().cpu().contiguous()
            else:
                rest[f"{number}.{name}"] = value
    return tensors, {"state": rest, "groups": state["param_groups"]}


def unpack(tensors: dict[str, torch.Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    """What `pack` was given."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **rest["state"]}.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = value
    groups = [{k: tuple(v) if k == "betas" else v for k, v in group.items()} for group in rest["groups"]]
    return {"state": state, "param_groups": groups}


def find(options: argparse.Namespace, accelerator: Accelerator, kind: str) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to resume from, checked, and its facts; None to start anew. Every rank calls this.

    Raises:
        UserError: it cannot be resumed from, see checkpoint_files.find; or not by this kind of run.
    """
    if not options.resume_from_checkpoint:
        return None
    found: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            found = [checkpoint_files.find(Path(options.output_dir), options.resume_from_checkpoint)]
        except UserError as error:
            found = [error]
    (folder,) = broadcast_object_list(found)
    if isinstance(folder, UserError):
        raise folder
    if folder is None:
        return None
    state = _state_of(folder)
    ranks, deepspeed = accelerator.num_processes, accelerator.distributed_type == DistributedType.DEEPSPEED
    if state["format"] != FORMAT:
        raise UserError(
            f"{folder} has format {state['format']}, expected {FORMAT}; resume with the version that wrote it."
        )
    if state["kind"] != kind:
        raise UserError(f"{folder} is of a {state['kind']} fine-tune, and this is a {kind} one; name another.")
    if state["deepspeed"] != deepspeed:
        how = "with" if state["deepspeed"] else "without"
        raise UserError(f"{folder} was written {how} DeepSpeed; resume it {how} DeepSpeed.")
    if deepspeed and state["ranks"] != ranks:
        raise UserError(
            f"{folder} was written by {state['ranks']} ranks, and DeepSpeed's state cannot be dealt out to {ranks}; "
            f"resume with {state['ranks']} ranks."
        )
    for sentence in differences(folder, state["flags"], options) if accelerator.is_main_process else []:
        logger.warning("%s", sentence)
    if options.max_train_steps and options.max_train_steps < state["step"]:
        raise UserError(
            f"--max_train_steps={options.max_train_steps} is less than the {state['step']} steps of {folder}; give "
            "more, or resume from an earlier checkpoint."
        )
    return folder, state


def _state_of(folder: Path) -> dict[str, Any]:
    """The facts of a checkpoint.

    Raises:
        UserError: they are not what `_write` writes.
    """
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if not all(isinstance(state[name], kind) for name, kind in FACTS.items()):
            raise TypeError
    except (ValueError, KeyError, TypeError):
        raise UserError(UNREADABLE.format(folder, STATE)) from None
    return state


def _tensors_of(folder: Path, name: str) -> dict[str, torch.Tensor]:
    try:
        return load_file(folder / name)
    except SafetensorError:
        raise UserError(UNREADABLE.format(folder, name)) from None


class Checkpoints:
    """Writes and reads the checkpoints of one run; every rank calls the same methods."""

    def __init__(
        self, options: argparse.Namespace, accelerator: Accelerator, trained: Trained, model: torch.nn.Module,
        optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler,
    ) -> None:  # fmt: skip
        """`model`, `optimizer`: as accelerate has prepared them; `trained`: the parts inside."""
        self.options, self.accelerator, self.trained = options, accelerator, trained
        self.model, self.optimizer, self.schedule = model, optimizer, schedule
        self.output = Path(options.output_dir)
        self.deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED

    def last(self) -> str:
        """The newest complete checkpoint, for a message."""
        known = checkpoint_files.complete_checkpoints(self.output)
        return str(known[-1]) if known else "none yet"

    def save(self, step: int, facts: dict[str, Any]) -> Path:
        """Write checkpoint-`step` with the run's `facts`, then drop those over the limit.

        Raises:
            UserError: it could not be written; the earlier ones are as they were.
        """
        folder = self.output / f"checkpoint-{step}"
        aside = folder.with_name(f".{folder.name}.partial")
        self._together(folder, lambda: self._begin(aside))
        if self.deepspeed:
            self._together(folder, lambda: self._write_deepspeed(aside), everyone=True)
        self._together(folder, lambda: self._write(aside, folder, {"step": step, **facts}))
        return folder

    def _together(self, folder: Path, write: Callable[[], None], everyone: bool = False) -> None:
        """Do one part of the writing on the main rank or everyone; where one fails, all stop with the same message."""
        wrong: str | None = None
        if everyone or self.accelerator.is_main_process:
            try:
                write()
            except (OSError, RuntimeError, SafetensorError) as error:
                wrong = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        wrong = next((one for one in gather_object([wrong]) if one), None)
        if wrong:
            if self.accelerator.is_main_process:
                shutil.rmtree(folder.with_name(f".{folder.name}.partial"), ignore_errors=True)
            raise UserError(
                f"{folder} could not be written ({wrong}); free some space and resume. "
                f"The last good checkpoint: {self.last()}.", 1,
            )  # fmt: skip

    def _begin(self, aside: Path) -> None:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        # Where it is plain that there is no room, no rank begins to write: DeepSpeed's would wait for one that failed.
        needed, free = self.least_bytes(), shutil.disk_usage(aside).free
        if free < needed:
            raise OSError(errno.ENOSPC, f"it takes {needed / 1e6:.1f} MB or more, and {free / 1e6:.1f} MB are free")

    def least_bytes(self) -> int:
        """What a checkpoint takes at least: the trained weights and two moments; DeepSpeed keeps the weights thrice."""
        count = sum(parameter.numel() for parameter in self.trained.parameters())
        moments = 2 if self.options.use_8bit_adam else 8
        return count * (4 + moments + (4 if self.deepspeed else 0))

    def _write_deepspeed(self, aside: Path) -> None:
        self.model.save_checkpoint(
            str(aside), tag=DEEPSPEED, save_latest=False, exclude_frozen_parameters=self.trained.lora
        )

    def _write(self, aside: Path, folder: Path, facts: dict[str, Any]) -> None:
        self.trained.write_weights(aside)
        state = {
            "format": FORMAT, "kind": self.trained.kind, "deepspeed": self.deepspeed,
            "ranks": self.accelerator.num_processes, "schedule": self.schedule.state_dict(),
            "flags": remembered(self.options), **facts,
        }  # fmt: skip
        if not self.deepspeed:
            tensors, state["optimizer"] = pack(self.optimizer.state_dict())
            save_file(tensors, aside / OPTIMIZER)
            if self.accelerator.scaler is not None:
                state["scaler"] = self.accelerator.scaler.state_dict()
        (aside / STATE).write_text(json.dumps(state) + "\n", encoding="utf-8")
        checkpoint_files.finish(aside, folder)
        checkpoint_files.rotate(self.output, self.options.checkpoints_total_limit, self.options.keep_every)

    def load(self, folder: Path, state: dict[str, Any]) -> None:
        """Put the run back to where `folder` was written.

        Raises:
            UserError: its tensors do not fit the model in training.
        """
        if self.deepspeed:
            if self.trained.lora:
                self._lora_of(folder)  # DeepSpeed would deal out the weights of other layers to those there are
            try:
                self.model.load_checkpoint(str(folder), tag=DEEPSPEED, load_module_strict=not self.trained.lora)
            except (RuntimeError, ValueError, KeyError):
                raise UserError(UNREADABLE.format(folder, "DeepSpeed's state")) from None
        else:
            self._load_weights(folder)
            try:
                self.optimizer.load_state_dict(unpack(_tensors_of(folder, OPTIMIZER), state["optimizer"]))
            except (KeyError, ValueError, TypeError, AttributeError):
                raise UserError(UNREADABLE.format(folder, "the optimizer's state")) from None
            if self.accelerator.scaler is not None and "scaler" in state:
                self.accelerator.scaler.load_state_dict(state["scaler"])
        self.schedule.load_state_dict(state["schedule"])
        for group, rate in zip(self.schedule.optimizer.param_groups, self.schedule.get_last_lr(), strict=True):
            group["lr"] = rate

    def _load_weights(self, folder: Path) -> None:
        if self.trained.lora:
            with torch.no_grad():
                for parameter, tensor in self._lora_of(folder):
                    parameter.copy_(tensor)
            return
        for name, part in self.trained.parts.items():
            if not (folder / name).is_dir():
                raise UserError(f"{folder} holds no {name}; give the same --train_text_encoder as before.")
            try:
                stored = type(part).from_pretrained(folder / name, torch_dtype=torch.float32, use_safetensors=True)
                part.load_state_dict(stored.state_dict())
            except (OSError, ValueError, KeyError, RuntimeError, SafetensorError):
                raise UserError(
                    f"{folder / name} cannot be read as the {name} in training; give the same "
                    "--pretrained_model_name_or_path as before, or resume from another checkpoint."
                ) from None

    def _lora_of(self, folder: Path) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
        """Each low-rank matrix in training with that of the checkpoint."""
        tensors = _tensors_of(folder, LORA)
        expected = {
            f"{name}.{key.replace('.default.', '.')}": parameter
            for name, part in self.trained.parts.items()
            for key, parameter in trainable(part).items()
        }
        shapes = {key: tuple(parameter.shape) for key, parameter in expected.items()}
        if shapes != {key: tuple(tensor.shape) for key, tensor in tensors.items()}:
            raise UserError(
                f"{folder} holds a LoRA of another rank or other layers; give the same --rank, --lora_layers, "
                "--lora_blocks and --train_text_encoder as before."
            )
        return [(parameter, tensors[key]) for key, parameter in expected.items()]
