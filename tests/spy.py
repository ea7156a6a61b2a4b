"""Runs a training script as `python script args` would, and writes down what happens inside it.

    accelerate launch … tests/spy.py SCRIPT ARGUMENTS…

SPY_DIR names a folder; rank N appends JSON lines to spy-N.jsonl there, each [event, value]:
    noise       sum of the noise drawn for a batch of latents
    prompts     the prompts given to a CLIP tokenizer
    t5          the prompts given to the T5 tokenizer
    latents     per image, sum of the latent distribution's mean, when latents are sampled
    validation  dtypes and checksums of transformer and VAE before and after a pipeline paints, and the noise's seed
    removed     name of a directory tree removed
    npu         sum of the state handed to the stand-in for torch.npu
SPY_KILL_AT=PART ends the process at once, as kill -9 would, when torch.save begins a file whose path has that part.
SPY_NPU=1 puts a stand-in for torch.npu in place that has a random state, and nothing else, of an NPU.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import torch


def record(event: str, value: object) -> None:
    path = Path(os.environ["SPY_DIR"]) / f"spy-{os.environ.get('RANK', '0')}.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps([event, value]) + "\n")


def before(owner: object, name: str, action) -> None:
    """Call action(args, kwargs) each time before owner.name runs."""
    original = getattr(owner, name)

    def wrapped(*args, **kwargs):
        action(args, kwargs)
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def fingerprint(pipeline) -> dict[str, list]:
    return {
        part: [
            sorted({str(p.dtype) for p in getattr(pipeline, part).parameters()}),
            sum(p.detach().double().sum().item() for p in getattr(pipeline, part).parameters()),
        ]
        for part in ("transformer", "vae")
    }


def watch() -> None:
    from diffusers import StableDiffusion3Pipeline
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from transformers import CLIPTokenizer, T5TokenizerFast

    original_randn_like = torch.randn_like

    def randn_like(tensor, *args, **kwargs):
        noise = original_randn_like(tensor, *args, **kwargs)
        if tensor.ndim == 4:
            record("noise", noise.double().sum().item())
        return noise

    torch.randn_like = randn_like

    def prompts(event):
        def note(args, kwargs):
            if isinstance(args[1] if len(args) > 1 else None, list):
                record(event, list(args[1]))

        return note

    before(CLIPTokenizer, "__call__", prompts("prompts"))
    before(T5TokenizerFast, "__call__", prompts("t5"))
    before(
        DiagonalGaussianDistribution,
        "sample",
        lambda args, kwargs: record("latents", args[0].mean.double().flatten(1).sum(1).tolist()),
    )
    before(shutil, "rmtree", lambda args, kwargs: record("removed", Path(args[0]).name))

    def maybe_kill(args, kwargs):
        part = os.environ.get("SPY_KILL_AT")
        if part and len(args) > 1 and part in str(args[1]):
            Path(args[1]).write_bytes(b"half a file")
            os._exit(137)

    before(torch, "save", maybe_kill)

    original_call = StableDiffusion3Pipeline.__call__

    def call(self, *args, **kwargs):
        first = fingerprint(self)
        result = original_call(self, *args, **kwargs)
        generator = kwargs.get("generator")
        record("validation", [first, fingerprint(self), None if generator is None else generator.initial_seed()])
        return result

    StableDiffusion3Pipeline.__call__ = call


def pretend_npu() -> None:
    """A generator of its own for each rank, moved on by each state that is asked for."""
    state = torch.Generator().manual_seed(100 + int(os.environ.get("RANK", "0")))
    torch.npu = SimpleNamespace(
        get_rng_state=lambda: torch.rand(8, generator=state),
        set_rng_state=lambda given: record("npu", given.double().sum().item()),
    )


if __name__ == "__main__":
    script = sys.argv[1]
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(script).parent)
    watch()
    if os.environ.get("SPY_NPU"):
        pretend_npu()
    runpy.run_path(script, run_name="__main__")
