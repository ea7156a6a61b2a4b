"""Flags, defaults, prompt files, and one sentence for each mistake."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from PIL import Image

from sd3.common.command_line import UserError
from sd3.common.pictures import PictureError, Recipe, pictures_in, read_recipe, save_picture
from sd3.inference.options import Defaults, Options, parse
from sd3.inference.prompts import Prompt, read_prompts

DEFAULTS = Defaults("Test.", "some/model", [Prompt("a dog", "a cat"), Prompt("a house")])
RECIPE = Recipe(
    prompt="A Red dog, 50% off: naïve/日本!", negative_prompt="x", seed=2**64 - 1, steps=3, guidance_scale=2.5,
    height=64, width=80, dtype="bfloat16", model="m", model_hash="1", lora="l", lora_hash="2", lora_scale=0.5,
)  # fmt: skip


def options(*arguments: str) -> Options:
    return parse(arguments, DEFAULTS)


def refused(*arguments: str) -> str:
    with pytest.raises(UserError) as error:
        parse(arguments, DEFAULTS)
    assert error.value.status == 2
    assert "\n" not in str(error.value)
    return str(error.value)


def test_defaults_are_the_published_ones() -> None:
    found = options()
    assert (found.steps, found.height, found.width, found.seeds) == (28, 1024, 1024, [8, 23, 42, 1334])
    assert (found.guidance_scale, found.output_dir, found.batch_size) == (1.0, Path("infer_result"), 1)
    assert found.prompts == [("a dog", "a cat"), ("a house", "")]
    assert not found.vae_tiling


def test_flags_win() -> None:
    sizes = ("--steps=9", "--height", "512")
    found = options("--prompt", "one", "--prompt=two", "--seeds", "1", "1", "2", *sizes, "--offload")
    assert found.prompts == [("one", ""), ("two", "")]
    assert (found.seeds, found.steps, found.height, found.width, found.offload) == ([1, 2], 9, 512, 1024, "model")
    assert options("--negative-prompt=grey").prompts == [("a dog", "grey"), ("a house", "grey")]
    assert options("--lora-scale=0", "--lora=x").lora_scale == 0


def test_large_pictures_are_decoded_in_tiles_unless_told_otherwise() -> None:
    large = ("--height=2048", "--width=2048")
    assert options(*large).vae_tiling
    assert not options(*large, "--vae-tiling=off").vae_tiling
    assert options("--vae-tiling=on").vae_tiling


def test_a_negative_prompt_without_guidance_is_noted() -> None:
    assert "note: negative prompts count only with --guidance-scale above 1; it is 1." in options().notes
    assert options("--guidance-scale=4").notes == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--height=1000"], "--height=1000 is no multiple of 16; the nearest is 992."),
        (["--width=8"], "--width=8 is out of range; give a whole number from 64 to 4096."),
        (["--steps=0"], "--steps=0 is out of range"),
        (["--steps=-3"], "--steps=-3 is out of range"),
        (["--steps=four"], "--steps=four is out of range"),
        (["--batch-size=0"], "--batch-size=0 is out of range"),
        (["--seeds", "1", "-1"], "--seeds=-1 is out of range"),
        (["--guidance-scale=nan"], "--guidance-scale=nan is out of range"),
        (["--lora-scale=big"], "--lora-scale=big is out of range"),
        (["--strength=1.5"], "--strength=1.5 is out of range"),
        (["--image=x.png", "--strength=0"], "--strength=0 would give the picture back"),
        (["--prompt", " "], "--prompt is empty"),
        (["--prompt=a", "--prompts-file=b.txt"], "exclude each other"),
        (["--prompt", "caf\udce9"], "is not UTF-8 text"),
        (["--local-files-only", "--image=https://a.example/b.png"], "--local-files-only forbids to fetch"),
        (["--dtype=float8"], "invalid choice: 'float8'"),
        (["--stepps=4"], "unrecognized arguments: --stepps=4"),
        (["--like=none.png"], "--like: none.png cannot be read as a picture"),
    ],
)
def test_one_sentence_for_each_mistake(arguments: list[str], said: str) -> None:
    assert said in refused(*arguments)


@pytest.mark.parametrize(
    ("constants", "said"), [({"dtype": "fp16"}, "DTYPE=fp16 is not known"), ({"seeds": []}, "SEEDS is empty")]
)
def test_a_constant_edited_wrongly_is_said(constants: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse([], dataclasses.replace(DEFAULTS, **constants))


def test_steps_from_a_picture_are_counted_as_the_library_does(tiny_model: Path) -> None:
    from diffusers import StableDiffusion3Img2ImgPipeline

    pipeline = StableDiffusion3Img2ImgPipeline.from_pretrained(tiny_model)
    for steps in (1, 4, 5, 28, 50):
        for strength in (0.01, 0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0):
            pipeline.scheduler.set_timesteps(steps)
            timesteps, _ = pipeline.get_timesteps(steps, strength, "cpu")
            ours = options("--image=x.png", f"--steps={steps}", f"--strength={strength}").steps_made
            assert ours == len(timesteps), (steps, strength)


def test_prompt_files(tmp_path: Path) -> None:
    text, table, lines = (tmp_path / f"p.{kind}" for kind in ("txt", "csv", "jsonl"))
    text.write_text("\ufeffa dog, big\n\n# a note\n  a cat \n", encoding="utf-8")
    assert read_prompts(text, "grey") == [("a dog, big", "grey"), ("a cat", "grey")]
    table.write_text('prompt,negative_prompt\n"a dog, big",blurry\na cat,\n')
    assert read_prompts(table, "grey") == [("a dog, big", "blurry"), ("a cat", "grey")]
    lines.write_text('{"prompt": "a\u2028dog"}\n\n{"prompt": "猫", "negative_prompt": "狗"}\n', encoding="utf-8")
    assert options(f"--prompts-file={lines}").prompts == [("a\u2028dog", ""), ("猫", "狗")]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.txt", b"# nothing\n\n", "holds no prompt"),
        ("p.txt", b"\xff\xfe\x00", "is not UTF-8 text"),
        ("p.csv", b"text\na dog\n", "has no column 'prompt'"),
        ("p.csv", b"prompt,negative_prompt\na,b\n,b\n", "line 3 has an empty prompt"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": 3}\n', "line 2 is not an object like"),
        ("p.jsonl", b"[1]\n", "line 1 is not an object like"),
        ("p.md", b"a dog\n", "is of no known kind"),
    ],
)
def test_prompt_files_that_cannot_be_used(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert said in refused(f"--prompts-file={tmp_path / name}")
    assert "cannot be read" in refused(f"--prompts-file={tmp_path / 'none.txt'}")


def test_a_recipe_is_kept_in_the_picture(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    save_picture(Image.new("RGB", (80, 64)), path, RECIPE, {"torch": "2"})
    assert read_recipe(path) == RECIPE
    with Image.open(path) as image:
        assert json.loads(image.text["versions"]) == {"torch": "2"}
        assert image.text["prompt"] == RECIPE.prompt
    assert pictures_in(tmp_path) == [(path, RECIPE)]


def test_a_foreign_picture_has_no_recipe(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "foreign.png")
    with pytest.raises(PictureError, match="carries no recipe"):
        read_recipe(tmp_path / "foreign.png")
    assert pictures_in(tmp_path) == []


def test_names_tell_recipes_apart_and_places_do_not_count() -> None:
    assert RECIPE.file_name().startswith(f"a-red-dog-50-off-naïve-日本-{2**64 - 1}-")
    other_prompt = {"prompt": "A Red dog, 50% off: naïve/日本?"}
    for change in ({"seed": 1}, other_prompt, {"lora_scale": 1.0}, {"dtype": "float32"}):
        assert dataclasses.replace(RECIPE, **change).file_name() != RECIPE.file_name()
    assert dataclasses.replace(RECIPE, model="elsewhere", lora="there").file_name() == RECIPE.file_name()
    assert dataclasses.replace(RECIPE, prompt="../../etc/passwd").file_name().startswith("etc-passwd-")
    assert len(dataclasses.replace(RECIPE, prompt="word " * 500).file_name()) < 90


def test_like_takes_the_recipe_and_flags_still_win(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    save_picture(Image.new("RGB", (80, 64)), path, RECIPE, {})
    found = options(f"--like={path}")
    assert found.prompts == [(RECIPE.prompt, "x")]
    assert (found.seeds, found.steps, found.height, found.width, found.dtype) == ([2**64 - 1], 3, 64, 80, "bfloat16")
    assert (found.lora, found.lora_scale, found.guidance_scale, found.overwrite) == ("l", 0.5, 2.5, True)
    changed = options(f"--like={path}", "--steps=5", "--prompt=another")
    assert (changed.steps, changed.prompts, changed.seeds) == (5, [("another", "")], [2**64 - 1])
