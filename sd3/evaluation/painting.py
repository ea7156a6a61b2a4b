"""Painting the pictures of a candidate: by the inference code, into a folder that is named by what it paints."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sd3.common.files import write_text
from sd3.common.pictures import Recipe
from sd3.evaluation.candidates import Candidate, PictureSet, read_folder, select

if TYPE_CHECKING:
    from sd3.inference.options import Options


class GenerationFailed(Exception):
    """The inference code gave up and has said why; `status` is its exit status."""

    def __init__(self, status: int) -> None:
        """`status` is not 0."""
        super().__init__(f"generation ended with status {status}")
        self.status = status


class Inference:
    """The inference code, loaded only where pictures are painted; tests put another one in its place."""

    def __init__(self) -> None:
        """One that has printed no notes yet; candidates share them."""
        self.notes: list[str] = []

    def generate(self, arguments: Sequence[str]) -> int:
        """Paint what the flags ask for; returns the exit status."""
        from sd3.inference.run import generate

        return generate(arguments, printed=self.notes)

    def origin(self, candidate: Candidate, options: Options, local_files_only: bool) -> Origin:
        """What recipes with these flags say of the candidate.

        Raises:
            UserError: the model or the LoRA cannot be used.
        """
        from sd3.inference.run import prompt_tokens
        from sd3.inference.sources import find_sources

        sources = find_sources(candidate.model, candidate.lora, local_files_only)
        return Origin(sources.model_hash(), sources.lora_hash(), prompt_tokens(options, sources).count)


class Origin(NamedTuple):
    """Hashes of the weights of model and LoRA, and how many tokens of a prompt T5 reads."""

    model_hash: str
    lora_hash: str
    max_sequence_length: int


def _digest(options: Options, dtype: str, origin: Origin) -> str:
    """What all pictures of a run have in common: the digest of a recipe without prompt and seed.

    The inference code reads the flags, so that a value and the default that equals it are one, and a flag that changes
    no pixel does not count.
    """
    return Recipe(
        prompt="", negative_prompt="", seed=0, steps=options.steps, guidance_scale=options.guidance_scale,
        height=options.height, width=options.width, dtype=dtype, model="",
        lora_scale=options.lora_scale if origin.lora_hash else 0.0, vae_tiling=options.vae_tiling, **origin._asdict(),
    ).digest()  # fmt: skip


def _folder(pictures: Path, label: str, digest: str) -> Path:
    """The folder of these pictures; the label is there to be read, so one made under another label is taken as it is.

    A model that was trained again has another digest and so another folder; what the old one painted stays.
    """
    if made := sorted(pictures.glob(f"*-{digest[:12]}")):
        return made[0]
    slug = re.sub(r"\W+", "-", label.lower()).strip("-")[:40] or "candidate"
    return pictures / f"{slug}-{digest[:12]}"


def paint(
    candidate: Candidate, prompts: Sequence[str], seeds: Sequence[int], dtype: str, flags: Sequence[str], output: Path,
    inference: Inference,
) -> PictureSet:  # fmt: skip
    """Paint every prompt with every seed into a folder in `output`/pictures; what is there is not made again.

    Args:
        candidate: its model and LoRA.
        prompts: each one once.
        seeds: each one once.
        dtype: of painting.
        flags: further flags of the inference scripts.
        output: the output directory of the evaluation.
        inference: what paints.

    Raises:
        GenerationFailed: it returned another status than 0.
        UserError: the model cannot be used, a flag is wrong, or pictures are missing or there twice.
    """
    from sd3.inference.options import parse
    from sd3.inference.run import TEXT_TO_IMAGE

    prompts_file = output / "prompts.jsonl"
    write_text(prompts_file, "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    lora = [f"--lora={candidate.lora}"] if candidate.lora else []
    arguments = [
        f"--model={candidate.model}", *lora, f"--prompts-file={prompts_file}", f"--dtype={dtype}", *flags, "--seeds",
        *map(str, seeds),
    ]  # fmt: skip
    options = parse(arguments, TEXT_TO_IMAGE)
    origin = inference.origin(candidate, options, options.local_files_only)
    folder = _folder(output / "pictures", candidate.label, _digest(options, dtype, origin))
    if status := inference.generate([f"--output-dir={folder}", *arguments]):
        raise GenerationFailed(status)
    return select(read_folder(candidate.label, folder), [(prompt, seed) for prompt in prompts for seed in seeds])
