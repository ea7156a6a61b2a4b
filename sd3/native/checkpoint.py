"""The state of a run, written to and read from a checkpoint: safetensors and JSON, so that reading executes nothing.

Only DeepSpeed writes and reads its own partitioned state, which it pickles. Such a checkpoint is trusted input: its
manifest is checked first, but whoever can write the directory can write the manifest.
"""

from __future__ import annotations

import argparse
import errno
import json
import logging
import pickle
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
from sd3.model.lora_file import LORA_FILE
from sd3.native import checkpoint_files
from sd3.native.checkpoint_files import unusable
from sd3.native.checkpoint_state import FORMAT, Mismatch, check_facts, check_scaler, check_schedule, check_tensor, shown
from sd3.native.flag_changes import differences, remembered
from sd3.native.model import Trained, trainable
from sd3.native.optimizer_state import check_groups, check_moments, complete, pack, unpack

logger = logging.getLogger(__name__)
STATE = "state.json"
OPTIMIZER = "optimizer.safetensors"
DEEPSPEED = "deepspeed"
# What DeepSpeed's own reading, and the unpickling in it, was seen to raise for files that were changed.
DEEPSPEED_ERRORS = (
    RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError, OSError, EOFError, ImportError,
    pickle.UnpicklingError,
)  # fmt: skip
# What safetensors raises, and torch for a tensor of it that cannot be.
TENSOR_ERRORS = (SafetensorError, OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError)


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
    except (ValueError, OSError, RecursionError):
        raise unusable(folder, STATE, "it is not the JSON that this engine writes") from None
    found = state.get("format") if isinstance(state, dict) else None
    if type(found) is int and found != FORMAT:
        raise UserError(
            f"{folder} has format {shown(found)}, expected {FORMAT}; resume with the version that wrote it."
        )
    try:
        check_facts(state, checkpoint_files.step_of(folder))
    except Mismatch as reason:
        raise unusable(folder, STATE, reason) from None
    return state


def _tensors_of(folder: Path, name: str) -> dict[str, torch.Tensor]:
    try:
        return load_file(folder / name)
    except TENSOR_ERRORS:
        raise unusable(folder, name, "it is not the safetensors that this engine writes") from None


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
        try:
            check_schedule(state["schedule"], len(self.schedule.base_lrs), state["step"])
        except Mismatch as reason:
            raise unusable(folder, STATE, reason) from None
        if self.deepspeed:
            if self.trained.lora:
                self._lora_of(folder)  # DeepSpeed would deal out the weights of other layers to those there are
            self._load_deepspeed(folder)
        else:
            self._load_weights(folder)
            self._load_optimizer(folder, state)
        self._load_schedule(state)

    def _load_deepspeed(self, folder: Path) -> None:
        try:
            found, _ = self.model.load_checkpoint(
                str(folder), tag=DEEPSPEED, load_module_strict=not self.trained.lora
            )
        except DEEPSPEED_ERRORS:
            found = None
        if found is None:
            raise unusable(folder, DEEPSPEED, "DeepSpeed's state is not what this engine writes") from None

    def _load_optimizer(self, folder: Path, state: dict[str, Any]) -> None:
        packed, scaler, name = state["optimizer"], self.accelerator.scaler, STATE
        try:
            check_groups(packed, self.optimizer, state["schedule"]["base_lrs"])
            if scaler is not None and ("scaler" in state or state["flags"].get("mixed_precision") == "fp16"):
                check_scaler(state.get("scaler", {}))
            name = OPTIMIZER
            tensors = _tensors_of(folder, OPTIMIZER)
            check_moments(tensors, packed, self.optimizer, state["schedule"]["last_epoch"], state["step"])
        except Mismatch as reason:
            raise unusable(folder, name, reason) from None
        self.optimizer.load_state_dict(unpack(tensors, complete(packed, self.optimizer)))
        if scaler is not None and "scaler" in state:
            # From another device's scaler: torch_npu's reads a name that torch's has not.
            scaler.load_state_dict({**scaler.state_dict(), **state["scaler"]})

    def _load_schedule(self, state: dict[str, Any]) -> None:
        own, stored = self.schedule.state_dict(), state["schedule"]
        # Versions of torch differ in what they note beside.
        self.schedule.load_state_dict({**own, **{name: stored[name] for name in own.keys() & stored.keys()}})
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
            _load_part(folder, name, part)

    def _lora_of(self, folder: Path) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
        """Each low-rank matrix in training with that of the checkpoint."""
        tensors = _tensors_of(folder, LORA_FILE)
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
        try:
            for key, parameter in expected.items():
                check_tensor(key, tensors[key], shapes[key], parameter.dtype)
        except Mismatch as reason:
            raise unusable(folder, LORA_FILE, reason) from None
        return [(parameter, tensors[key]) for key, parameter in expected.items()]


def _load_part(folder: Path, name: str, part: torch.nn.Module) -> None:
    """Put the tensors below `folder`/`name` into a part in training, which they must fill.

    Its config is not read: the part is there already.

    Raises:
        UserError: they are not those of this part.
    """
    expected, loaded = part.state_dict(), set()
    for path in sorted((folder / name).glob("*.safetensors")):
        file = f"{name}/{path.name}"
        tensors = _tensors_of(folder, file)
        try:
            for key, tensor in tensors.items():
                if key not in expected or key in loaded:
                    raise Mismatch(f"{shown(key)} is {'there twice' if key in loaded else 'not a weight of it'}")
                check_tensor(key, tensor, tuple(expected[key].shape), expected[key].dtype)
        except Mismatch as reason:
            raise unusable(folder, file, f"{reason}, of the {name} in training") from None
        part.load_state_dict(tensors, strict=False)
        loaded |= tensors.keys()
    # A tensor with two names is written once.
    filled = {expected[key].data_ptr() for key in loaded}
    if lacking := [key for key in expected if key not in loaded and expected[key].data_ptr() not in filled]:
        raise unusable(folder, name, f"{lacking[0]}, of the {name} in training, is missing")
