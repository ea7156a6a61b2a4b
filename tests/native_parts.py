"""What the tests of the native engine share."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sd3.native.data import Items, Loader, Samples, Texts
from sd3.native.options import parse
from sd3.native.pictures import View
from sd3.native.precompute import Precompute
from sd3.native.stream import Stream

NEEDED = ("--pretrained_model_name_or_path=m", "--instance_prompt=a dog", "--instance_data_dir=d")


def options(*arguments: str, kind: str = "lora") -> argparse.Namespace:
    """Options with what has to be given given; later arguments overrule earlier ones."""
    has_data = any(one.startswith("--dataset_name=") for one in arguments)
    return parse(kind, [*NEEDED[: -1 if has_data else None], *arguments])


class Ranks:
    """As much of an accelerator as preparations need; `arrivals` counts the waits for the other ranks."""

    def __init__(self, index: int = 0, count: int = 1) -> None:
        self.process_index, self.num_processes = index, count
        self.is_main_process, self.is_local_main_process = index == 0, False
        self.device, self.arrivals = torch.device("cpu"), 0

    def wait_for_everyone(self) -> None:
        self.arrivals += 1


def noise_pictures(folder: Path) -> list[Path]:
    """Ten pictures of noise, wider than high, in a folder that is there."""
    generator = torch.Generator().manual_seed(0)
    for number in range(10):
        values = torch.randint(0, 256, (6, 9, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(values.numpy()).resize((48, 32)).save(folder / f"{number}.png")
    return sorted(folder.glob("*.png"))


def view(file: Path, crop: tuple[float, float] | None = None, flip: bool = False) -> View:
    """A square of a picture file; its middle, if nothing else is said."""
    return View(file.name, file.read_bytes, crop, flip)


def loader(given: argparse.Namespace, model: Path, ranks: Ranks | None = None) -> Loader:
    """What feeds a run in float32 with these options, after everything was computed that it reads."""
    ranks = ranks or Ranks()
    precompute = Precompute(given, model, ranks)
    items = Items(given, precompute)
    texts = Texts.prepare(given, items, precompute, torch.float32)
    stream = Stream(
        given.seed or 0, len(items), given.train_batch_size, given.gradient_accumulation_steps, ranks.num_processes
    )
    return Loader(given, Samples(items, stream, precompute.cache), texts, ranks.device)


def with_changed(model: Path, part: str, folder: Path) -> Path:
    """The same pipeline, one tensor of a part a little different."""
    changed = Path(shutil.copytree(model, folder / "model"))
    (file,) = (changed / part).glob("*.safetensors")
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + 1e-3
    save_file(tensors, file, {"format": "pt"})
    return changed


def with_variant(model: Path, folder: Path) -> Path:
    """The same pipeline, each part's weights there a second time, as the variant fp16."""
    made = Path(shutil.copytree(model, folder / "model"))
    for file in list(made.glob("*/*.safetensors")):
        shutil.copy(file, file.with_name(f"{file.stem}.fp16{file.suffix}"))
    return made
