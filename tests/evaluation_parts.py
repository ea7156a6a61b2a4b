"""Tiny feature models with random weights, and pictures with recipes, for the tests of the evaluation."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from sd3.common.pictures import Recipe, save_picture
from sd3.evaluation.candidates import Candidate
from sd3.evaluation.painting import Inference, Origin
from sd3.inference.options import Options

SIDE = 32
PATCH = 8
CLIP_WIDTH = 24
VIT_WIDTH = 20


def _processor(folder: Path) -> None:
    from transformers import CLIPImageProcessor

    size = {"height": SIDE, "width": SIDE}
    CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=size).save_pretrained(folder)


def make_feature_models(folder: Path) -> None:
    """Directories clip, vit and dinov2 as save_pretrained leaves them."""
    import torch
    from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model, ViTConfig, ViTModel

    from sd3.common.tiny_tokenizers import write_clip_tokenizer

    write_clip_tokenizer(folder / "clip")
    vocabulary = 514
    common = {"num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPModel(
            CLIPConfig(
                text_config={
                    **common, "vocab_size": vocabulary, "hidden_size": 16, "intermediate_size": 32,
                    "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513,
                },
                vision_config={
                    **common, "hidden_size": 16, "intermediate_size": 32, "image_size": SIDE, "patch_size": PATCH,
                },
                projection_dim=CLIP_WIDTH,
            )
        ).save_pretrained(folder / "clip")
        vision = {**common, "hidden_size": VIT_WIDTH, "image_size": SIDE, "patch_size": PATCH}
        ViTModel(ViTConfig(**vision, intermediate_size=32), add_pooling_layer=False).save_pretrained(folder / "vit")
        Dinov2Model(Dinov2Config(**vision, mlp_ratio=2)).save_pretrained(folder / "dinov2")
    for name in ("clip", "vit", "dinov2"):
        _processor(folder / name)


def recipe(prompt: str, seed: int, **changes: object) -> Recipe:
    """A recipe as the inference scripts write it."""
    values = {
        "prompt": prompt, "negative_prompt": "", "seed": seed, "steps": 28, "guidance_scale": 1.0, "height": 48,
        "width": 48, "dtype": "float32", "model": "models/base", "model_hash": "a" * 64,
    }  # fmt: skip
    return Recipe(**{**values, **changes})  # type: ignore[arg-type]


def draw(seed: object, side: int = 48) -> Image.Image:
    """A picture that is the same for the same seed and looks like no other."""
    rng = random.Random(str(seed))

    def colour() -> tuple[int, ...]:
        return tuple(rng.randrange(256) for _ in range(3))

    image = Image.new("RGB", (side, side), colour())
    canvas = ImageDraw.Draw(image)
    for _ in range(6):
        x, y = rng.randrange(side), rng.randrange(side)
        canvas.ellipse((x - 9, y - 9, x + 9, y + 9), fill=colour())
    return image


def fill(folder: Path, prompts: Sequence[str], seeds: Sequence[int], tag: object = "", **changes: object) -> Path:
    """A folder of pictures as the inference scripts leave it."""
    for prompt in prompts:
        for seed in seeds:
            made = recipe(prompt, seed, **changes)
            save_picture(draw((tag, prompt, seed)), folder / made.file_name(), made, {"torch": "0"})
    return folder


class FakeInference(Inference):
    """Paints pictures at once, by the flags of the inference code, and remembers what it was asked."""

    def __init__(self, status: int = 0, paints: bool = True) -> None:
        """`status` is what each call returns; pictures are written only with 0."""
        super().__init__()
        self.status = status
        self.paints = paints
        self.calls: list[list[str]] = []
        self.trained = 0  # how often the models were trained again in their places
        self.made: list[Path] = []

    def origin(self, candidate: Candidate, options: Options, local_files_only: bool) -> Origin:
        """Other hashes after another training."""
        lora_hash = self._hash(candidate.lora) if candidate.lora else ""
        return Origin(self._hash(candidate.model), lora_hash, options.max_sequence_length or 256)

    def _hash(self, name: str) -> str:
        return f"{name} {self.trained}"

    def generate(self, arguments: Sequence[str]) -> int:
        """Paint what is not there."""
        from sd3.inference.options import parse
        from sd3.inference.run import TEXT_TO_IMAGE

        self.calls.append(list(arguments))
        if self.status or not self.paints:
            return self.status
        options = parse(arguments, TEXT_TO_IMAGE)
        changes: dict[str, object] = {
            "steps": options.steps, "dtype": options.dtype, "model": options.model,
            "max_sequence_length": options.max_sequence_length or 256, "model_hash": self._hash(options.model),
        }  # fmt: skip
        if options.lora:
            changes |= {"lora": options.lora, "lora_hash": self._hash(options.lora), "lora_scale": 1.0}
        there = set(options.output_dir.glob("*.png"))
        fill(options.output_dir, [prompt.text for prompt in options.prompts], options.seeds,
             tag=(options.model, options.lora, self.trained), **changes)  # fmt: skip
        self.made += sorted(set(options.output_dir.glob("*.png")) - there)
        return 0
