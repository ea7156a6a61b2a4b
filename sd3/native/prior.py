"""Class pictures for prior preservation: painted by the model as it was before the training.

A picture is made by its number alone: its noise has a generator of its own, and the pictures painted together are
always the same ones. What a killed run left unmade is thus made later with the pixels it would have had.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from tqdm.auto import tqdm

from sd3.common.command_line import UserError
from sd3.common.files import new_file
from sd3.common.model_files import parts_of
from sd3.common.part_loading import by_itself, load_tokenizer, load_weights
from sd3.common.pictures import picture_files
from sd3.inference.weights import release, told_of_memory
from sd3.native.text import ENCODERS, TOKENIZERS

if TYPE_CHECKING:
    from accelerate import Accelerator

MODEL_CLASSES = {"transformer": SD3Transformer2DModel, "vae": AutoencoderKL}
OWN_NAME = re.compile(r"class-\d{5,}\.png")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Seeds of two runs are this far apart, so that they share no picture's seed.
NUMBERS_PER_SEED = 1 << 20


def class_pictures(options: argparse.Namespace) -> list[Path]:
    """The class pictures to train on, by name: at most --num_class_images."""
    return picture_files(Path(options.class_data_dir))[: options.num_class_images]


def make_class_images(options: argparse.Namespace, model: str | Path, accelerator: Accelerator) -> None:
    """Fill --class_data_dir up to --num_class_images pictures; `model` is a pipeline directory or a hub name.

    Every rank calls it and paints its share; all are done when it returns.

    Raises:
        UserError: the directory cannot be made, or the device has too little memory.
    """
    folder = Path(options.class_data_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--class_data_dir={folder} cannot be made ({error.strerror}); name another.") from None
    chunks = _unfinished_chunks(folder, options.num_class_images, options.sample_batch_size)
    accelerator.wait_for_everyone()  # every rank has to see the same pictures missing before one paints
    if share := chunks[accelerator.process_index :: accelerator.num_processes]:
        _paint(options, model, accelerator, share)
        release(accelerator.device.type)
    accelerator.wait_for_everyone()


def _path(folder: Path, number: int) -> Path:
    return folder / f"class-{number:05}.png"


def _unfinished_chunks(folder: Path, count: int, size: int) -> list[range]:
    """Numbers painted together, `size` at most, where a picture of them is missing; foreign pictures count as made."""
    there = picture_files(folder)
    if len(there) >= count:
        return []
    own = count - sum(not OWN_NAME.fullmatch(path.name) for path in there)
    chunks = [range(start, min(start + size, own)) for start in range(0, own, size)]
    return [chunk for chunk in chunks if not all(_path(folder, number).exists() for number in chunk)]


def _unusual_parts(model: Path, variant: str | None, dtype: torch.dtype) -> dict[str, Any]:
    """Parts of a pipeline directory that StableDiffusion3Pipeline.from_pretrained has to be given: those that the model
    has not, as None, and those with files that it would not find."""
    there, found = parts_of(model), {}
    for name, kind in {**MODEL_CLASSES, **ENCODERS, **TOKENIZERS}.items():
        if name not in there:
            found[name] = None
        elif name in TOKENIZERS and not by_itself(model / name):
            found[name] = load_tokenizer(kind, model / name)
        elif not by_itself(model / name, variant):
            found[name] = load_weights(kind, model / name, variant, torch_dtype=dtype)
    return found


def _paint(options: argparse.Namespace, model: str | Path, accelerator: Accelerator, chunks: list[range]) -> None:
    """Paint the chunks and write those of their pictures that are missing."""
    device, folder = accelerator.device, Path(options.class_data_dir)
    usual = torch.float32 if device.type == "cpu" else torch.float16
    dtype = DTYPES.get(options.prior_generation_precision, usual)
    advice = f"lower --sample_batch_size={options.sample_batch_size}"
    with told_of_memory(device.type, advice):
        pipeline = StableDiffusion3Pipeline.from_pretrained(
            model, revision=options.revision, variant=options.variant, torch_dtype=dtype,
            **_unusual_parts(Path(model), options.variant, dtype),
        ).to(device)  # fmt: skip
        pipeline.set_progress_bar_config(disable=True)
        for chunk in tqdm(chunks, "Painting class pictures", disable=not accelerator.is_local_main_process):
            first = (options.seed or 0) * NUMBERS_PER_SEED
            # On the CPU the noise is the same whatever device paints.
            generators = [torch.Generator("cpu").manual_seed(first + number) for number in chunk]
            images = pipeline([options.class_prompt] * len(chunk), generator=generators).images
            for number, image in zip(chunk, images, strict=True):
                if not (path := _path(folder, number)).exists():
                    with new_file(path) as aside:
                        image.save(aside, format="PNG")
