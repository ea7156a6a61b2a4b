"""What the two scripts for a LoRA of drawn creatures share: their prompts, each with what to keep away from."""

from __future__ import annotations

from collections.abc import Sequence

from sd3.inference.options import Defaults
from sd3.inference.prompts import Prompt
from sd3.inference.run import main as run

_FLAWS = "blurry, deformed, low quality, watermark"

PROMPTS = [
    Prompt("a small dragon with paper wings, pokemon style, moonlight", _FLAWS),
    Prompt("a yellow mouse-like creature crossing a busy street, pokemon style, night", _FLAWS),
    Prompt("a red panda in tall grass, pokemon style, evening light", _FLAWS),
    Prompt("a lion resting on a couch beside a vase of tulips, pokemon style, dark studio", _FLAWS),
    Prompt("a long-haired cat wading through a river, pokemon style, sunset, shallow depth of field", _FLAWS),
    Prompt("a pig in a miniature forest of fruit trees, pokemon style, rainbow", f"empty background, {_FLAWS}"),
    Prompt("a girl with glasses with a round pink creature, pokemon style, bright colours", f"extra fingers, {_FLAWS}"),
    Prompt("an electric creature with mechanical arms, pokemon style, neon city", _FLAWS),
]


def main(summary: str, model: str, lora: str, dtype: str | None, output_dir: str, seeds: Sequence[int]) -> int:
    """The command line of a script with these constants at its top; returns the exit status."""
    return run(Defaults(summary, model, PROMPTS, dtype=dtype, lora=lora, output_dir=output_dir, seeds=seeds))
