"""Validation: pictures by seed, seen by the trackers, and a training that does not notice."""

from __future__ import annotations

import random
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.tracking import TensorBoardTracker
from diffusers import StableDiffusion3Pipeline
from PIL import Image

from native_parts import options
from sd3.common.report_events import read_events
from sd3.native.validation import validate

PROMPT = {"prompt": "a dog"}


class Small:
    """The tiny pipeline, painting small pictures in two steps."""

    def __init__(self, pipeline: StableDiffusion3Pipeline) -> None:
        self.pipeline, self.components = pipeline, pipeline.components
        self.set_progress_bar_config = pipeline.set_progress_bar_config

    def __call__(self, **settings: object) -> object:
        settings = {"height": 32, "width": 32, "num_inference_steps": 2} | settings
        assert not any(part.training for part in self.modules().values())
        torch.rand(1), random.random(), np.random.rand()  # as a part might that draws for itself
        return self.pipeline(**settings)

    def modules(self) -> dict[str, torch.nn.Module]:
        return {name: part for name, part in self.components.items() if isinstance(part, torch.nn.Module)}


@pytest.fixture(scope="module")
def pipeline(tiny_model: Path) -> Small:
    return Small(StableDiffusion3Pipeline.from_pretrained(tiny_model))


def accelerator(*trackers: object, is_main_process: bool = True) -> types.SimpleNamespace:
    cpu = torch.device("cpu")
    return types.SimpleNamespace(device=cpu, trackers=list(trackers), is_main_process=is_main_process)


def painted(pipeline: Small, *flags: str, dtype: torch.dtype = torch.float32, **prompt: object) -> list[bytes]:
    given = options("--num_validation_images=2", "--validation_prompt=a dog", *flags)
    pictures = validate(given, pipeline, accelerator(), 1, "validation", dtype, prompt or PROMPT)
    assert all(picture.size == (32, 32) for picture in pictures)
    return [picture.tobytes() for picture in pictures]


def test_a_seed_gives_the_same_pictures_and_none_others(pipeline: Small) -> None:
    first = painted(pipeline, "--seed=0")
    assert len(set(first)) == 2
    assert painted(pipeline, "--seed=0") == first
    assert painted(pipeline, "--seed=1") != first
    torch.manual_seed(5)
    unseeded = painted(pipeline)
    torch.manual_seed(5)
    assert painted(pipeline) != unseeded


def test_embeds_serve_as_well_as_the_prompt(pipeline: Small) -> None:
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    with torch.no_grad():
        embeds = dict(zip(names, pipeline.pipeline.encode_prompt("a dog", None, None), strict=True))
    assert painted(pipeline, "--seed=3", **embeds) == painted(pipeline, "--seed=3")


@pytest.mark.parametrize("seed", [(), ("--seed=3",)])
def test_the_training_does_not_notice(seed: tuple[str, ...], tiny_model: Path) -> None:
    pipeline = Small(StableDiffusion3Pipeline.from_pretrained(tiny_model))
    parts = pipeline.modules()
    parts["text_encoder"].to(torch.bfloat16)
    parts["transformer"].train()
    parts["transformer"].transformer_blocks[0].eval()
    before = {name: [tensor.clone() for tensor in part.state_dict().values()] for name, part in parts.items()}
    modes = [[module.training for module in part.modules()] for part in parts.values()]
    states = (torch.get_rng_state(), random.getstate(), repr(np.random.get_state()))
    painted(pipeline, *seed, dtype=torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), repr(np.random.get_state())) == states[1:]
    assert [[module.training for module in part.modules()] for part in parts.values()] == modes
    for name, part in parts.items():
        for old, new in zip(before[name], part.state_dict().values(), strict=True):
            assert new.dtype == old.dtype and torch.equal(new, old)


def test_modes_are_restored_where_the_painting_fails(pipeline: Small) -> None:
    transformer = pipeline.modules()["transformer"].train()
    with pytest.raises(ValueError):
        painted(pipeline, height=33)
    assert transformer.training
    transformer.eval()


@pytest.mark.parametrize("phase", ["validation", "test"])
def test_the_report_finds_the_pictures(phase: str, pipeline: Small, tmp_path: Path) -> None:
    tracker = TensorBoardTracker.__new__(TensorBoardTracker)  # its own start needs a whole accelerator
    from torch.utils.tensorboard import SummaryWriter

    tracker.writer = SummaryWriter(tmp_path / "logs")
    given = options("--num_validation_images=2", "--seed=0")
    validate(given, pipeline, accelerator(tracker), 7, phase, torch.float32, PROMPT)
    tracker.writer.add_scalar("loss", 1.0, 7)  # pictures alone are no session
    tracker.writer.close()
    events = read_events(tmp_path)
    assert [(tag, step) for tag, step, _, _ in events.pictures] == [(phase, 7)]
    assert events.pictures[0][3].startswith(b"\x89PNG")


def test_wandb_is_told_with_captions(pipeline: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = types.ModuleType("wandb")
    wandb.Image = lambda picture, caption: (picture, caption)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    logged: list[dict] = []
    tracker = types.SimpleNamespace(name="wandb", log=logged.append)
    other = types.SimpleNamespace(name="another")
    given = options("--num_validation_images=1", "--validation_prompt=a dog")
    validate(given, pipeline, accelerator(tracker, other), 1, "test", torch.float32, PROMPT)
    ((picture, caption),) = logged[0]["test"]
    assert isinstance(picture, Image.Image) and caption == "0: a dog"


def test_nothing_is_shown_of_nothing_or_by_other_ranks(pipeline: Small) -> None:
    broken = types.SimpleNamespace(name="tensorboard")  # as TensorBoard's tracker is on every rank but the first
    none = options("--num_validation_images=0")
    assert validate(none, pipeline, accelerator(broken), 1, "test", torch.float32, PROMPT) == []
    one = options("--num_validation_images=1")
    assert validate(one, pipeline, accelerator(broken, is_main_process=False), 1, "test", torch.float32, PROMPT)
