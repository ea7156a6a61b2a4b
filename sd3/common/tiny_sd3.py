"""A whole SD3 pipeline directory with random weights, small enough to train on a CPU in seconds.

It has every part of the published model (transformer, VAE, two CLIP text encoders with projection, T5 encoder, their
tokenizers, scheduler) in the published layout, so whatever loads SD3 loads it. It paints noise: it proves that code
runs, not that it learns.

    python -m sd3.common.tiny_sd3 --output DIR [--size SIZE] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from sd3.common.files import new_directory
from sd3.common.model_sizes import SIZES, ModelSize
from sd3.common.tiny_tokenizers import write_clip_tokenizer, write_t5_tokenizer

# The last three take minutes; in float16 15, 16 and 28 GB on the disk, and 40 GB of memory.
MADE = tuple(SIZES)


def write_frame(folder: Path, words: Sequence[str] = ()) -> tuple[int, int]:
    """Write what a pipeline directory has beside its models: index, scheduler and tokenizers, to which `words` are one
    token each; returns the sizes of the CLIP and T5 vocabularies."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    for name in ("tokenizer", "tokenizer_2"):
        clip_rows = write_clip_tokenizer(folder / name, words)
    t5_rows = write_t5_tokenizer(folder / "tokenizer_3", words)
    FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusion3Pipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_3": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "tokenizer_3": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return clip_rows, t5_rows


def _write_parts(folder: Path, seed: int, size: ModelSize, half: bool) -> None:
    import torch

    from sd3.common import model_parts

    clip_vocabulary, t5_vocabulary = write_frame(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        makers = {
            "text_encoder": lambda: model_parts.make_clip(size.clips[0], clip_vocabulary),
            "text_encoder_2": lambda: model_parts.make_clip(size.clips[1], clip_vocabulary),
            "text_encoder_3": lambda: model_parts.make_t5(size, t5_vocabulary),
            "vae": lambda: model_parts.make_vae(size),
            "transformer": lambda: model_parts.make_transformer(size),
        }
        for name, make in makers.items():  # one part in memory at a time
            part = make()
            (part.half() if half else part).save_pretrained(folder / name)


def make_tiny_sd3(output: Path, seed: int = 0, size: str = "tiny", half: bool = False) -> None:
    """Write the pipeline directory `output`, of a size in MADE; the same seed gives the same files.

    `half`: in float16, as the published weights are, else in float32.

    Raises:
        FileExistsError: `output` exists and is not an empty directory.
    """
    with new_directory(output, "--output") as aside:
        _write_parts(aside, seed, SIZES[size], half)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Make a tiny SD3 pipeline directory with random weights.")
    parser.add_argument("--output", type=Path, required=True, help="directory to make")
    parser.add_argument("--size", choices=MADE, default="tiny", help="see sd3/common/model_sizes.py (default tiny)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights (default 0)")
    options = parser.parse_args(arguments)
    try:
        make_tiny_sd3(options.output, options.seed, options.size)
    except OSError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    from sd3.common import venv

    venv.ensure(["torch", "diffusers"])
    sys.exit(main())
