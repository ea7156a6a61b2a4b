"""The pictures are those of the library's own pipelines, and depend on nothing but their recipe."""

from __future__ import annotations

import dataclasses
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Img2ImgPipeline, StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from painting import make_lora
from sd3.common.command_line import UserError
from sd3.common.pictures import Recipe
from sd3.inference.paint import Painter, encode_prompts
from sd3.inference.sources import find_sources
from sd3.inference.weights import Weights

CPU = torch.device("cpu")
PROMPTS = ["a red dog", "a blue cat", "one green bird on a branch"]
# Batched matrix products round otherwise than single ones, and now and then a value of 8 bits falls over an edge.
ONE_LEVEL = 1


def recipes(**changes: object) -> list[Recipe]:
    """Three prompts with two seeds each."""
    common = {"steps": 4, "guidance_scale": 1.0, "height": 64, "width": 64, "dtype": "float32", "model": "m"}
    common |= {"negative_prompt": "blurry", "model_hash": "h", **changes}
    return [Recipe(prompt=prompt, seed=seed, **common) for prompt in PROMPTS for seed in (8, 23)]


def weights_of(model: Path, lora: Path | None = None, lora_scale: float = 1.0) -> Weights:
    return Weights(find_sources(str(model), str(lora or "")), torch.float32, lora_scale)


def paint(weights: Weights, wanted: list[Recipe], batch_size: int = 1, start: Image.Image | None = None) -> np.ndarray:
    """Pixels (pictures, height, width, 3), 0 to 255."""
    texts = [recipe.prompt for recipe in wanted] + [recipe.negative_prompt for recipe in wanted]
    embeds = encode_prompts(weights, texts, CPU)
    painter = Painter(weights, CPU, start)
    images = []
    for first in range(0, len(wanted), batch_size):
        images += painter.paint(wanted[first : first + batch_size], embeds)
    return np.stack([np.asarray(image) for image in images]).astype(int)


def by_the_library(model: Path, wanted: list[Recipe], lora: Path | None = None, scale: float = 1.0) -> np.ndarray:
    """The published loop: one call a picture, everything at once on the device."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    if lora:
        pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
    images = [
        pipeline(
            recipe.prompt, negative_prompt=recipe.negative_prompt, num_inference_steps=recipe.steps,
            guidance_scale=recipe.guidance_scale, height=recipe.height, width=recipe.width,
            generator=torch.Generator("cpu").manual_seed(recipe.seed),
            joint_attention_kwargs={"scale": scale} if lora else None,
        ).images[0]
        for recipe in wanted
    ]  # fmt: skip
    return np.stack([np.asarray(image) for image in images]).astype(int)


def test_embeds_are_the_pipelines(tiny_model: Path) -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_model)
    ours = encode_prompts(weights_of(tiny_model), PROMPTS, CPU)
    for prompt in PROMPTS:
        theirs, _, pooled, _ = pipeline.encode_prompt(prompt, prompt, prompt, do_classifier_free_guidance=False)
        assert torch.equal(ours[prompt].prompt, theirs)
        assert torch.equal(ours[prompt].pooled, pooled)


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_pictures_are_the_pipelines(tiny_model: Path, guidance_scale: float) -> None:
    wanted = recipes(guidance_scale=guidance_scale)
    ours = paint(weights_of(tiny_model), wanted)
    assert np.array_equal(ours, by_the_library(tiny_model, wanted))
    # The negative prompt counts where there is guidance, and only there.
    other = paint(weights_of(tiny_model), recipes(guidance_scale=guidance_scale, negative_prompt="a dog"))
    assert np.array_equal(ours, other) == (guidance_scale == 1.0)


@pytest.mark.parametrize("text_encoders", [False, True])
def test_a_lora_counts_as_in_the_pipeline(tiny_model: Path, tmp_path: Path, text_encoders: bool) -> None:
    lora = make_lora(tiny_model, tmp_path, text_encoders)
    wanted = recipes()[:2]
    base = paint(weights_of(tiny_model), wanted)
    for scale in (1.0, 0.5):
        ours = paint(weights_of(tiny_model, lora, scale), wanted)
        assert np.array_equal(ours, by_the_library(tiny_model, wanted, lora, scale))
        assert not np.array_equal(ours, base)
    assert np.array_equal(paint(weights_of(tiny_model, lora, 0.0), wanted), base)


def test_a_picture_to_start_from_counts_as_in_the_pipeline(tiny_model: Path) -> None:
    start = Image.effect_noise((64, 64), 60).convert("RGB")
    wanted = recipes(guidance_scale=3.0, strength=0.6, image="x", image_hash="y")
    pipeline = StableDiffusion3Img2ImgPipeline.from_pretrained(tiny_model)
    pipeline.set_progress_bar_config(disable=True)
    theirs = [
        pipeline(
            recipe.prompt, image=start, strength=0.6, negative_prompt=recipe.negative_prompt, num_inference_steps=4,
            guidance_scale=3.0, generator=torch.Generator("cpu").manual_seed(recipe.seed), height=64, width=64,
        ).images[0]
        for recipe in wanted
    ]  # fmt: skip
    ours = paint(weights_of(tiny_model), wanted, start=start)
    assert np.array_equal(ours, np.stack([np.asarray(image) for image in theirs]))


@pytest.mark.parametrize("batch_size", [3, 8])
def test_a_batch_changes_a_picture_by_rounding_alone(tiny_model: Path, batch_size: int) -> None:
    wanted = recipes(guidance_scale=4.0)
    single = paint(weights_of(tiny_model), wanted)
    batched = paint(weights_of(tiny_model), wanted, batch_size)
    assert abs(batched - single).max() <= ONE_LEVEL
    assert (batched != single).mean() < 1e-3


def test_order_and_company_do_not_count(tiny_model: Path) -> None:
    wanted = recipes()
    assert np.array_equal(paint(weights_of(tiny_model), wanted[::-1])[::-1], paint(weights_of(tiny_model), wanted))


def test_steps_are_counted(tiny_model: Path) -> None:
    weights = weights_of(tiny_model)
    counted: list[int] = []
    wanted = recipes()[:2]
    Painter(weights, CPU).paint(wanted, encode_prompts(weights, [wanted[0].prompt], CPU), counted.append)
    assert counted == [2] * 4


def test_numbers_out_of_range_are_said_and_not_painted_black(tiny_model: Path) -> None:
    weights = weights_of(tiny_model)
    painter = Painter(weights, CPU)
    painter.pipeline.transformer.proj_out.weight.fill_(float("inf"))
    (wanted,) = recipes()[:1]
    with pytest.raises(UserError, match="seed 8 left the range of float32"):
        painter.paint([wanted], encode_prompts(weights, [wanted.prompt], CPU))


def test_too_little_memory_is_said(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = weights_of(tiny_model)
    painter = Painter(weights, CPU)

    def exhausted(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(painter.pipeline.vae, "decode", exhausted)
    (wanted,) = recipes()[:1]
    with pytest.raises(UserError, match="too little memory; lower --batch-size=1, or give --vae-tiling=on"):
        painter.paint([wanted], encode_prompts(weights, [wanted.prompt], CPU))


def test_missing_weights_are_an_error_and_not_drawn_at_random(tiny_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    for part in ("text_encoder", "text_encoder_3", "transformer", "vae"):
        (file,) = (model / part).glob("*.safetensors")
        tensors = load_file(file)
        key = sorted(tensors)[-1]
        save_file({name: tensor for name, tensor in tensors.items() if name != key}, file, {"format": "pt"})
    weights = weights_of(model)
    spoilt = (weights.transformer, weights.vae, partial(weights.text_encoder, "text_encoder", CPU))
    for load in (*spoilt, partial(weights.text_encoder, "text_encoder_3", CPU)):
        with pytest.raises(UserError, match="download it again"):
            load()
    weights.text_encoder("text_encoder_2", CPU)


def test_batches_in_several_processes_differ_by_rounding_alone(tiny_model: Path) -> None:
    """Shares of 2 processes end in batches of other sizes than one process has."""
    wanted = recipes()
    whole = paint(weights_of(tiny_model), wanted, 4)
    shares = np.concatenate([paint(weights_of(tiny_model), part, 4) for part in (wanted[:3], wanted[3:])])
    assert abs(whole - shares).max() <= ONE_LEVEL


@pytest.mark.long
def test_compiled_pictures_differ_by_rounding_alone(tiny_model: Path) -> None:
    weights = weights_of(tiny_model)
    wanted = [dataclasses.replace(recipes()[0], steps=2)]
    embeds = encode_prompts(weights, [wanted[0].prompt], CPU)
    plain, compiled = (
        np.asarray(Painter(weights, CPU, compiled=flag).paint(wanted, embeds)[0]).astype(int) for flag in (False, True)
    )
    assert abs(plain - compiled).max() <= ONE_LEVEL


def test_tiles_are_used_when_asked_for(tiny_model: Path) -> None:
    """On a picture larger than a tile the seams blend, so that it differs from one decoded whole."""
    weights = weights_of(tiny_model)
    wanted = [dataclasses.replace(recipes()[0], height=128, width=128, steps=1)]
    embeds = encode_prompts(weights, [wanted[0].prompt], CPU)
    whole, tiled = (np.asarray(Painter(weights, CPU, tiling=flag).paint(wanted, embeds)[0]) for flag in (False, True))
    assert whole.shape == tiled.shape
    assert not np.array_equal(whole, tiled)
