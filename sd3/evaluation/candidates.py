"""What is compared: sets of pictures by the same prompts and seeds, read from folders, in one order."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from sd3.common.command_line import UserError
from sd3.common.pictures import Recipe, pictures_in

KEYS = ("label", "model", "lora")
# A difference in one of these is no difference between the models, and is said in the report.
SETTINGS = ("negative_prompt", "steps", "guidance_scale", "height", "width", "dtype", "lora_scale", "strength",
            "max_sequence_length")  # fmt: skip
Key = tuple[str, int]  # prompt, seed


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One column of the comparison: a folder of pictures, or a model to paint them with."""

    label: str
    folder: Path | None = None
    model: str = ""
    lora: str = ""


@dataclasses.dataclass(frozen=True)
class PictureSet:
    """The pictures of a candidate, in the order that all candidates share."""

    label: str
    paths: list[Path]
    recipes: list[Recipe]

    def keys(self) -> list[Key]:
        """Prompt and seed of each picture."""
        return [(recipe.prompt, recipe.seed) for recipe in self.recipes]

    def seeds(self) -> list[int]:
        """All seeds, ascending."""
        return sorted({recipe.seed for recipe in self.recipes})


def parse_candidate(text: str) -> Candidate:
    r"""A candidate from label=...,model=...[,lora=...]; a comma in a value is written as \, there.

    Raises:
        UserError: a part is missing, unknown or given twice.
    """
    example = "write label=NAME,model=DIR or label=NAME,model=DIR,lora=FILE"
    found: dict[str, str] = {}
    for piece in re.split(r"(?<!\\),", text):
        key, equals, value = piece.partition("=")
        if not equals or key not in KEYS:
            raise UserError(
                rf"--candidate={text}: '{piece}' is none of label=, model= and lora=; {example}, "
                r"with \, for a comma in a path."
            )
        if key in found or not value:
            raise UserError(f"--candidate={text}: {key}= is {'given twice' if key in found else 'empty'}; {example}.")
        found[key] = value.replace("\\,", ",")
    if missing := [key for key in ("label", "model") if key not in found]:
        raise UserError(f"--candidate={text} lacks {missing[0]}=; {example}.")
    return Candidate(found["label"], model=found["model"], lora=found.get("lora", ""))


def read_folder(label: str, folder: Path) -> PictureSet:
    """The pictures of a folder that the inference scripts filled; a contact sheet among them is passed over.

    Raises:
        UserError: there is no such folder, no picture, a damaged one, or two of the same prompt and seed.
    """
    if not folder.is_dir():
        raise UserError(f"--pictures={folder} is no directory; give a folder that the inference scripts filled.")
    found = pictures_in(folder)
    for other in sorted(set(folder.glob("[!.]*.png")) - {path for path, _ in found}):
        try:
            with Image.open(other) as image:
                image.load()  # a cut file opens well, and lacks its recipe only for want of its end
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"{other} cannot be read as a picture ({error}); make it again or remove it.") from None
    if not found:
        raise UserError(
            f"{folder} holds no PNG file with a recipe; give a folder that this project's inference scripts filled."
        )
    seen: dict[Key, Path] = {}
    for path, recipe in found:
        if other_path := seen.get((recipe.prompt, recipe.seed)):
            raise UserError(
                f"{folder} holds two pictures of the same prompt and seed, {other_path.name} and {path.name}; "
                "keep one set of pictures in a folder."
            )
        seen[recipe.prompt, recipe.seed] = path
    return PictureSet(label, [path for path, _ in found], [recipe for _, recipe in found])


def select(pictures: PictureSet, keys: Sequence[Key]) -> PictureSet:
    """The pictures of these prompts and seeds, in this order.

    Raises:
        UserError: one is missing.
    """
    index = {key: number for number, key in enumerate(pictures.keys())}
    if missing := [key for key in keys if key not in index]:
        prompt, seed = missing[0]
        raise UserError(
            f"'{pictures.label}' lacks a picture of prompt '{prompt}' with seed {seed}; "
            "paint every candidate with the same prompts and seeds."
        )
    order = [index[key] for key in keys]
    return PictureSet(
        pictures.label, [pictures.paths[number] for number in order], [pictures.recipes[number] for number in order]
    )


def align(sets: Sequence[PictureSet]) -> list[PictureSet]:
    """All sets in one order: prompts as the first set has them, seeds ascending.

    Raises:
        UserError: they are not of the same prompts and seeds.
    """
    first = sets[0]
    rank = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompt for prompt, _ in first.keys()))}
    keys = sorted(first.keys(), key=lambda key: (rank[key[0]], key[1]))
    aligned = [select(pictures, keys) for pictures in sets]
    for pictures in sets[1:]:
        if extra := sorted(set(pictures.keys()) - set(keys)):
            raise UserError(
                f"'{pictures.label}' has a picture of prompt '{extra[0][0]}' with seed {extra[0][1]}, and "
                f"'{first.label}' has not; paint every candidate with the same prompts and seeds."
            )
    return aligned


def unequal_settings(sets: Sequence[PictureSet]) -> list[str]:
    """A sentence for each setting that is not the same for all candidates."""
    notes = []
    for name in SETTINGS:
        values = [sorted({str(getattr(recipe, name)) for recipe in pictures.recipes}) for pictures in sets]
        # A base model has no LoRA, so its scale of 0 tells nothing.
        if name == "lora_scale":
            values = [value for value in values if value != ["0.0"] and value != ["0"]]
        if any(value != values[0] for value in values):
            said = "; ".join(f"{s.label}: {', '.join(v)}" for s, v in zip(sets, values, strict=False))
            notes.append(f"The candidates were painted with different {name.replace('_', ' ')} ({said}).")
    return notes
