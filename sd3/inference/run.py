"""A run of an inference script: options, plan, painting, contact sheet and index."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sd3.common.command_line import UserError, make_output_dir
from sd3.common.model_files import largest_side
from sd3.common.package_versions import package_versions
from sd3.common.pictures import PictureError, Recipe, read_recipe, save_picture
from sd3.inference.options import Defaults, Options, parse
from sd3.inference.ranks import Ranks

if TYPE_CHECKING:
    from PIL import Image

    from sd3.inference.sources import Sources

TEXT_TO_IMAGE = Defaults(summary="Pictures from prompts.", model="", prompts=())
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "pillow")


@dataclass
class Plan:
    """All pictures of a run, and those still to make."""

    sources: Sources
    pictures: list[tuple[Path, Recipe]]
    missing: list[tuple[Path, Recipe]]
    start: Image.Image | None = None


def main(defaults: Defaults) -> int:
    """The command line of a script; returns the exit status."""
    return generate(sys.argv[1:], defaults)


def generate(
    arguments: Sequence[str], defaults: Defaults = TEXT_TO_IMAGE, printed: list[str] | None = None
) -> int:
    """Paint what the flags ask for and return the exit status; what a user did wrong is said in one sentence.

    `printed`: notes that were printed before and are not to be printed again; new ones are added.
    """
    ranks = Ranks()
    try:
        _run(parse(arguments, defaults), ranks, [] if printed is None else printed)
    except UserError as error:
        ranks.say(str(error))
        return error.status
    except KeyboardInterrupt:
        print("stopped; the same command goes on where this one ended.", file=sys.stderr)
        return 130
    return 0


def _run(options: Options, ranks: Ranks, printed: list[str]) -> None:
    ranks.take_device(options.device)
    dtype = options.dtype or ("float32" if ranks.device == "cpu" else "float16")
    check_dtype(ranks.torch_device, dtype)
    if ranks.device == "cpu" and options.offload:
        raise UserError("--offload moves weights off an accelerator, and --device=cpu has none; leave it out.")
    plan = ranks.share(make_plan(options, dtype) if ranks.first else None)
    if ranks.first:
        for note in options.notes:
            if note not in printed:
                print(note, file=sys.stderr)
                printed.append(note)
        there = len(plan.pictures) - len(plan.missing)
        if there:
            print(f"{there} of {len(plan.pictures)} pictures are there already; --overwrite makes them again.")
    if plan.missing:
        _paint(options, dtype, plan, ranks)
    if ranks.first:
        _finish(options, plan)


def make_plan(options: Options, dtype: str) -> Plan:
    """Find the model, name every picture, and see which are there.

    Raises:
        UserError: the model, the LoRA, the picture to start from or the output directory cannot be used.
    """
    from sd3.inference.sources import find_sources
    from sd3.inference.start_image import fit, read_image

    if not options.model:
        raise UserError("--model is missing; give a model directory or a hub name.")
    if not options.prompts:
        raise UserError("--prompt is missing; say what to paint.")
    start, image_hash = read_image(options.image) if options.image else (None, "")
    sources = find_sources(options.model, options.lora, options.local_files_only, options.default_lora)
    _check_size(options, sources)
    tokens = prompt_tokens(options, sources)
    options.notes.extend(sources.notes())
    common = {
        "steps": options.steps, "guidance_scale": options.guidance_scale, "height": options.height,
        "width": options.width, "dtype": dtype, "model": _place(options.model), "model_hash": sources.model_hash(),
        "vae_tiling": options.vae_tiling, "max_sequence_length": tokens.count,
    }  # fmt: skip
    if sources.lora:
        common |= {"lora": _place(str(sources.lora)), "lora_hash": sources.lora_hash()}
        common |= {"lora_scale": options.lora_scale}
    if start is not None:
        common |= {"image": _place(options.image), "image_hash": image_hash, "strength": options.strength}
        start = fit(start, options.width, options.height)
    recipes = [
        Recipe(prompt=prompt.text, negative_prompt=prompt.negative, seed=seed, **common)
        for prompt in options.prompts
        for seed in options.seeds
    ]
    options.notes += [note for note in (tokens.note, _cut_note(options, sources, tokens.count)) if note]
    if options.like and options.like[1].digest() not in {recipe.digest() for recipe in recipes}:
        _explain_difference(options, recipes[0])
    pictures = [(_target(options, recipe), recipe) for recipe in recipes]
    make_output_dir(options.output_dir)
    missing = [(path, recipe) for path, recipe in pictures if options.overwrite or not _is_there(path, recipe)]
    return Plan(sources, pictures, missing, start)


class PromptTokens(NamedTuple):
    """How many tokens T5 reads of a prompt, and a note that says why, empty where it is the usual number."""

    count: int
    note: str


def prompt_tokens(options: Options, sources: Sources) -> PromptTokens:
    """The length that the flags or --like ask for, else that of the training, else the library's default.

    Raises:
        UserError: the model or the LoRA states a length that is none.
    """
    from sd3.common.trained_length import DEFAULT, find_trained_length

    count, why = options.max_sequence_length, "as asked for"
    if count is None and (trained := find_trained_length(sources.length_records)):
        count, why = trained.tokens, f"as in training ({trained.file}); --max-sequence-length changes that"
    if count in (None, DEFAULT):
        return PromptTokens(DEFAULT, "")
    if "text_encoder_3" not in sources.parts:
        return PromptTokens(count, "")
    return PromptTokens(count, f"T5 reads {count} tokens of a prompt, {why}.")


def _cut_note(options: Options, sources: Sources, t5_tokens: int) -> str:
    """Which prompts lose their ends, empty where none does."""
    from sd3.data.caption_lengths import cut_sentence, cuts_by_folder

    texts = [prompt.text for prompt in options.prompts]
    if options.guidance_scale > 1:
        texts += [prompt.negative for prompt in options.prompts if prompt.negative]
    texts = list(dict.fromkeys(texts))
    sentence = cut_sentence(cuts_by_folder(texts, sources.parts, t5_tokens), len(texts), "prompts")
    return f"note: {sentence}" if sentence else ""


def _place(name: str) -> str:
    """Where a part is, whoever asks from wherever; a hub name or an address stays as it is."""
    return os.path.abspath(name) if os.path.exists(name) else name


def _target(options: Options, recipe: Recipe) -> Path:
    """The file of a picture; never the one that --like is to be compared with."""
    path = options.output_dir / (options.example_name or recipe.file_name())
    if options.like and path.exists() and path.samefile(options.like[0]):
        return path.with_name(f"{path.stem}-again.png")
    return path


def _check_size(options: Options, sources: Sources) -> None:
    """The transformer knows positions up to a side of its own."""
    most = largest_side(sources.parts["transformer"], sources.parts["vae"])
    for option, side in (("--height", options.height), ("--width", options.width)):
        if side > most:
            raise UserError(f"{option}={side} is more than {options.model} was made for; give at most {most}.")


def _explain_difference(options: Options, recipe: Recipe) -> None:
    """A recipe that cannot be followed is an error where the model is at fault, a note where the flags are."""
    path, wanted = options.like  # type: ignore[misc]
    for part, option in (("model_hash", "--model"), ("lora_hash", "--lora"), ("image_hash", "--image")):
        named = part.removesuffix("_hash")
        if getattr(wanted, part) != getattr(recipe, part) and getattr(wanted, named) == getattr(recipe, named):
            raise UserError(
                f"--like={path} was made with another content of {getattr(wanted, named)}; give the original with "
                f"{option}."
            )
    options.notes.append(f"note: the flags differ from the recipe of {path}; this will be another picture.")


def _is_there(path: Path, recipe: Recipe) -> bool:
    """Is the picture made? A file of that name with another recipe is somebody's, and is not replaced."""
    if not path.exists():
        return False
    try:
        found = read_recipe(path)
    except PictureError:
        found = None
    if found is None or found.digest() != recipe.digest():
        raise UserError(f"{path} exists and was made otherwise; give --overwrite to replace it, or --output-dir.")
    return True


def _paint(options: Options, dtype: str, plan: Plan, ranks: Ranks) -> None:
    import torch

    from sd3.inference.paint import Painter, encode_prompts
    from sd3.inference.progress import Progress
    from sd3.inference.weights import Weights

    own = ranks.own_part(plan.missing)
    own_paths = {path for path, _ in own}
    others = [path for path, _ in plan.missing if path not in own_paths]
    device = torch.device(ranks.torch_device)
    with Progress(len(own), others, options.steps_made, show=ranks.first) as progress:
        if own:
            weights = Weights(plan.sources, getattr(torch, dtype), options.lora_scale)
            texts = [recipe.prompt for _, recipe in own]
            if options.guidance_scale > 1:
                texts += [recipe.negative_prompt for _, recipe in own]
            embeds = encode_prompts(weights, texts, device, own[0][1].max_sequence_length)
            painter = Painter(
                weights, device, plan.start, options.offload, compiled=options.compile, tiling=options.vae_tiling
            )
            made_by = versions(ranks.device)
            for first in range(0, len(own), options.batch_size):
                batch = own[first : first + options.batch_size]
                images = painter.paint([recipe for _, recipe in batch], embeds, on_step=progress.step)
                for image, (path, recipe) in zip(images, batch, strict=True):
                    save_picture(image, path, recipe, made_by)
        ranks.finish(meanwhile=progress.refresh)


def _finish(options: Options, plan: Plan) -> None:
    from sd3.inference.sheet import INDEX, write_index, write_sheets

    if options.like:
        _compare(options.like[0], plan.pictures[0][0])
    if hidden := [path.name for path, _ in plan.missing if not path.exists()]:
        raise UserError(
            f"{len(hidden)} pictures of other machines are not in --output-dir={options.output_dir}, {hidden[0]} among "
            "them; name a directory that all machines share."
        )
    count = write_index(options.output_dir)
    sheets = write_sheets(options.output_dir, plan.pictures)
    print(f"{len(plan.missing)} pictures made in {options.output_dir}; {INDEX} lists {count}.")
    for sheet in sheets:
        print(f"contact sheet: {sheet}")


def _compare(original: Path, again: Path) -> None:
    """Say whether the picture that was made again is the same."""
    from PIL import Image, ImageChops

    with Image.open(original) as one, Image.open(again) as other:
        if one.size != other.size:
            print(f"{again} has another size than {original}.")
            return
        difference = ImageChops.difference(one.convert("RGB"), other.convert("RGB"))
        most = max(high for _, high in difference.getextrema())
    same = "has the same pixels as" if most == 0 else f"differs by up to {most} of 255 from"
    print(f"{again} {same} {original}.")


def check_dtype(device: str, dtype: str) -> None:
    """Try what a transformer needs, at a tiny size.

    Raises:
        UserError: the device cannot do it in this dtype.
    """
    import torch
    from torch.nn import functional

    try:
        kind = getattr(torch, dtype)
        x = torch.ones(1, 2, 4, 8, dtype=kind, device=device)
        functional.conv2d(x, torch.ones(2, 2, 3, 3, dtype=kind, device=device), padding=1)
        functional.layer_norm(functional.scaled_dot_product_attention(x, x, x) @ x.transpose(-1, -2), (4,))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--dtype={dtype} does not work on --device={device} ({reason}); use another dtype.") from None


def versions(device: str) -> dict[str, str]:
    """Versions of the packages that paint, and the kind of device: what a recipe leaves open."""
    return {"device": device, **package_versions(PACKAGES)}
