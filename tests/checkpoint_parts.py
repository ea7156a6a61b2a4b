"""As much of a run as has checkpoints, and ways to change what it saved, manifest included."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import DistributedType
from safetensors.torch import load_file, save_file

from native_parts import options as native_options
from sd3.native import checkpoint, checkpoint_files
from sd3.native.optimizer import make_lr_schedule, make_optimizer

STEPS = 3


class Part(torch.nn.Module):
    """A little of a model: a weight that a short moment would have a kernel read beyond, a scalar, a second name."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(64, 33, generator=torch.Generator().manual_seed(0)))
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.tied = self.weight

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir()
        tensors = {name: value.detach().clone() for name, value in self.state_dict().items() if name != "tied"}
        save_file(tensors, folder / "model.safetensors")


class Run:
    """As much of a run as has checkpoints."""

    def __init__(self, output: Path, *flags: str) -> None:
        self.options = native_options(f"--output_dir={output}", "--resume_from_checkpoint=latest", *flags, kind="full")
        self.accelerator = SimpleNamespace(
            is_main_process=True, num_processes=1, distributed_type=DistributedType.NO, scaler=None
        )
        part = Part()
        self.trained = SimpleNamespace(
            lora=False, kind="full", parts={"part": part}, parameters=part.parameters,
            write_weights=lambda folder: part.save_pretrained(folder / "part"),
        )  # fmt: skip
        groups = [{"params": [part.weight], "lr": 1e-2}, {"params": [part.scale], "lr": 5e-3, "weight_decay": 1e-3}]
        self.optimizer = make_optimizer(self.options, groups, "cpu", checkpoint.logger)
        self.schedule = make_lr_schedule(self.options, self.optimizer, 10)
        self.checkpoints = checkpoint.Checkpoints(
            self.options, self.accelerator, self.trained, part, self.optimizer, self.schedule
        )

    def step(self) -> None:
        part = self.trained.parts["part"]
        (part.weight.square().sum() * part.scale).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()

    def resume(self) -> None:
        self.checkpoints.load(*checkpoint.find(self.options, self.accelerator, "full"))


def rewritten(saved: Path, output: Path, change: Callable[[Path], object]) -> Path:
    """A copy of the run whose last checkpoint was changed, its manifest with it."""
    shutil.rmtree(output, ignore_errors=True)
    shutil.copytree(saved, output)
    folder = output / f"checkpoint-{STEPS}"
    change(folder)
    (folder / "manifest.json").unlink()
    (folder / "complete").unlink()
    aside = folder.rename(output / ".aside")
    checkpoint_files.finish(aside, folder)
    return folder


def in_state(change: Callable[[Any], object]) -> Callable[[Path], object]:
    def changed(folder: Path) -> None:
        state = json.loads((folder / "state.json").read_text())
        change(state)
        (folder / "state.json").write_text(json.dumps(state))

    return changed


def put(path: str, value: object) -> Callable[[Path], object]:
    """Set what lies at a path of the state, such as optimizer.groups.0.lr."""

    def change(state: Any) -> None:
        *way, last = path.split(".")
        for name in way:
            state = state[int(name) if isinstance(state, list) else name]
        state[int(last) if isinstance(state, list) else last] = value

    return in_state(change)


def in_tensors(change: Callable[[dict[str, torch.Tensor]], object], file: str = "optimizer.safetensors"):
    def changed(folder: Path) -> None:
        tensors = load_file(folder / file)
        change(tensors)
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / file)

    return changed


def tensor(name: str, value: torch.Tensor, file: str = "optimizer.safetensors") -> Callable[[Path], object]:
    return in_tensors(lambda tensors: tensors.update({name: value}), file)
