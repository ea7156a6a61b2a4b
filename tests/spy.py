"""Runs a training script as `python script args` would, and writes down what happens inside it.

    accelerate launch … tests/spy.py SCRIPT ARGUMENTS…

SPY_DIR names a folder; rank N appends JSON lines to spy-N.jsonl there, each [event, value]:
    noise       sum of the noise drawn for a batch of latents
    prompts     the prompts given to a CLIP tokenizer
    t5          the prompts given to the T5 tokenizer
    latents     per image, sum of the latent distribution's mean, when latents are sampled
    text_tokens length of the text that the transformer is given
    reduction   number of messages in which DDP has sent a model's gradients to the other ranks
    validation  dtypes and checksums of transformer and VAE before and after a pipeline paints, and the noise's seed
    removed     name of a directory tree removed
    npu         sum of the state handed to the stand-in for torch.npu
SPY_KILL_AT=PART ends the process at once, as kill -9 would, when torch.save begins a file whose path has that part.
SPY_NAN=RANK:N makes the N-th noise of a rank NaN, and SPY_NAN_GRADIENT=N the gradients of all ranks' N-th batch.
SPY_LATE=RANK:SECONDS has a rank sleep when it is given its seed.
SPY_NPU=1 puts a stand-in for torch.npu in place that has a random state, and nothing else, of an NPU.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import runpy
import shutil
import sys
import time
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


def setting_of_rank(name: str) -> int | None:
    """N where the environment variable is RANK:N and this is that rank."""
    rank, _, value = os.environ.get(name, "").partition(":")
    return int(value) if rank == os.environ.get("RANK", "0") else None


def disturb() -> None:
    """Gradients that are NaN, and a rank that comes late."""
    import accelerate

    counted = itertools.count(1)
    original = accelerate.Accelerator.backward

    def backward(self, loss, **kwargs):
        original(self, loss, **kwargs)
        if os.environ.get("SPY_NAN_GRADIENT") == str(next(counted)):
            next(p for p in self._models[0].parameters() if p.grad is not None).grad.fill_(math.nan)

    accelerate.Accelerator.backward = backward
    before(accelerate.utils, "set_seed", lambda args, kwargs: time.sleep(setting_of_rank("SPY_LATE") or 0))


def watch_reductions(ddp: type) -> None:
    """Record what each DDP model sends, by the hook that DDP offers in place of its own all-reduce."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    original = ddp.__init__

    def counted(group, bucket):
        if bucket.is_last():
            record("reduction", bucket.index() + 1)
        return allreduce_hook(group, bucket)

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.register_comm_hook(None, counted)

    ddp.__init__ = init


def watch() -> None:
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from torch.nn.parallel import DistributedDataParallel
    from transformers import CLIPTokenizer, T5TokenizerFast

    original_randn_like = torch.randn_like
    counted = itertools.count(1)

    def randn_like(tensor, *args, **kwargs):
        noise = original_randn_like(tensor, *args, **kwargs)
        if tensor.ndim == 4:
            record("noise", noise.double().sum().item())
            if setting_of_rank("SPY_NAN") == next(counted):
                noise.fill_(math.nan)
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
    before(
        SD3Transformer2DModel,
        "forward",
        lambda args, kwargs: record("text_tokens", kwargs["encoder_hidden_states"].shape[1]),
    )
    watch_reductions(DistributedDataParallel)
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
    disturb()
    if os.environ.get("SPY_NPU"):
        pretend_npu()
    runpy.run_path(script, run_name="__main__")
