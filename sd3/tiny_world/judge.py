"""Trains two feature models that can judge pictures of the world, so that the evaluation needs no downloads.

`clip` tells whether a picture shows what a caption says; `vit` tells whether two pictures show the same figure,
wherever it is. Both see plain shapes and striped figures with and without faces, and neither has seen the subject.

    python -m sd3.tiny_world.judge --output DIR [--seed 0] [--steps N]
    python sd3/evaluate_sd3.py --clip-model=DIR/clip --dino-model=DIR/vit ...
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import ImageFilter
from torch.nn.functional import binary_cross_entropy_with_logits, normalize
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from sd3.common.command_line import Parser, UserError
from sd3.common.files import new_directory
from sd3.common.tiny_tokenizers import write_clip_tokenizer
from sd3.tiny_world.autoencoder import as_tensor
from sd3.tiny_world.classifier import pixels_of
from sd3.tiny_world.grammar import BACKGROUNDS, COLOURS, SHAPES, Scene, caption_of, draw_scene, forget, words
from sd3.tiny_world.loop import Trainer, rounded, seeded
from sd3.tiny_world.render import SIZE, Pixels, render, to_image
from sd3.tiny_world.subject import SUBJECT, Figure, draw_any_figure, draw_figure, draw_pose, ground

STEPS, LEARNING_RATE = 1500, 1.5e-3
_PICTURES = 48  # in a batch
_VIEWS = 3  # of each figure in a batch
_PATCH = 8
_TEXT_TOKENS = 24
_HALF = [0.5, 0.5, 0.5]


def _seen(picture: Pixels, rng: random.Random) -> Pixels:
    """The picture as a painter might have made it: many are a little blurred."""
    if rng.random() < 0.5:
        return picture
    return pixels_of(to_image(picture).filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.2))))


def new_figure(rng: random.Random) -> Figure:
    """Any figure or plain shape, but none that could be taken for the subject."""
    while True:
        figure = draw_any_figure(rng, SHAPES)
        if rng.random() < 0.3:
            colour = rng.choice(list(COLOURS.values()))
            figure = figure._replace(colours=(colour, colour), face=None)
        apart = [
            min(sum(abs(a - b) for a, b in zip(one, other, strict=True)) for other in SUBJECT.colours)
            for one in figure.colours
        ]
        if figure.shape != SUBJECT.shape or max(apart) > 120:
            return figure


def _variant(figure: Figure, rng: random.Random) -> Figure:
    """A figure that differs in one thing from another, so that every thing counts."""
    other = new_figure(rng)
    name = rng.choice(Figure._fields)
    if name == "face" and (figure.face is None) == (other.face is None):
        return figure._replace(face=None if figure.face else (250, 240, 220))
    if name in ("period", "turn"):
        name = "colours"
    return figure._replace(**{name: getattr(other, name)})


def figure_picture(figure: Figure, rng: random.Random) -> Pixels:
    """The figure somewhere, on one of the world's backgrounds."""
    return draw_figure(ground(rng.choice(list(BACKGROUNDS))), draw_pose(rng), figure)


def _shows(scene: Scene, told: Scene) -> bool:
    return all(value is None or getattr(scene, name) == value for name, value in vars(told).items())


def _captioned(rng: random.Random) -> tuple[Pixels, Scene]:
    """A picture and what is true of it. Of a striped figure that is its shape, which has no one colour."""
    if rng.random() < 0.75:
        scene = draw_scene(rng)
        return render(scene, rng, loose=rng.random() < 0.3), scene
    figure, background = new_figure(rng), rng.choice(list(BACKGROUNDS))
    colours = {value: name for name, value in COLOURS.items()}
    colour = colours.get(figure.colours[0]) if figure.colours[0] == figure.colours[1] else None
    scene = Scene(figure.shape, "one", colour, "large", None, background)
    return draw_figure(ground(background), draw_pose(rng), figure), scene


def caption_loss(clip: CLIPModel, tokenizer: CLIPTokenizer, bias: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """Whether each caption of a batch is true of each picture, told from their cosine (Zhai et al. 2023,
    arXiv:2303.15343); captions are true of many pictures, so that a choice of one would teach what is false."""
    pairs = [_captioned(rng) for _ in range(_PICTURES)]
    told = [forget(scene, rng) for _, scene in pairs]
    tokens = tokenizer(
        [caption_of(one, rng) for one in told], padding="max_length", max_length=_TEXT_TOKENS, return_tensors="pt"
    )
    pictures = as_tensor([_seen(picture, rng) for picture, _ in pairs])
    images = normalize(clip.get_image_features(pixel_values=pictures), dim=-1)
    texts = normalize(clip.get_text_features(**tokens), dim=-1)
    true = torch.tensor([[float(_shows(scene, one)) for one in told] for _, scene in pairs])
    logits = images @ texts.T * clip.logit_scale.exp() + bias
    # As many false pairs as true ones count.
    weight = torch.where(true > 0, (1 - true).sum() / true.sum(), 1.0)
    return binary_cross_entropy_with_logits(logits, true, weight)


def figure_loss(vit: ViTModel, rng: random.Random) -> torch.Tensor:
    """Which pictures of a batch show the same figure (supervised contrastive loss: Khosla et al. 2020,
    arXiv:2004.11362, equation 2), half of the figures being variants of the others."""
    figures: list[Figure] = []
    for _ in range(_PICTURES // _VIEWS // 2):
        figures.append(new_figure(rng))
        figures.append(_variant(figures[-1], rng))
    labels = torch.tensor([figures.index(figure) for figure in figures for _ in range(_VIEWS)])
    pictures = as_tensor([_seen(figure_picture(figures[label], rng), rng) for label in labels.tolist()])
    features = normalize(vit(pixel_values=pictures).last_hidden_state[:, 0], dim=-1)
    own = torch.eye(len(labels), dtype=torch.bool)
    logits = (features @ features.T / 0.1).masked_fill(own, float("-inf"))
    same = (labels[:, None] == labels[None]) & ~own
    return -(logits.log_softmax(-1).masked_fill(~same, 0).sum(-1) / same.sum(-1)).mean()


def make_models(rows: int) -> tuple[CLIPModel, ViTModel]:
    """Both with fresh weights; `rows`: size of the vocabulary, whose last two tokens begin and end a text."""
    common = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 48, "intermediate_size": 96}
    vision = {"image_size": SIZE, "patch_size": _PATCH}
    ends = {"bos_token_id": rows - 2, "eos_token_id": rows - 1, "pad_token_id": rows - 1}
    clip = CLIPModel(
        CLIPConfig(
            text_config={**common, **ends, "vocab_size": rows},
            vision_config={**common, **vision, "num_hidden_layers": 3},
            projection_dim=48,
        )
    )
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = ViTConfig(**{**common, **vision, **still, "num_hidden_layers": 4})
    return clip.eval(), ViTModel(config, add_pooling_layer=False).eval()


def train_judge(folder: Path, seed: int, steps: int = STEPS) -> None:
    """Write the directories `clip` and `vit`, each with its processor, in float16."""
    rows = write_clip_tokenizer(folder / "clip", words())
    tokenizer = CLIPTokenizer.from_pretrained(folder / "clip", clean_up_tokenization_spaces=True)
    made: list[tuple[CLIPModel, ViTModel]] = []

    def both() -> torch.nn.Module:
        made.append(make_models(rows))
        return torch.nn.ModuleList(made[0])

    seeded(both, seed)
    clip, vit = made[0]
    biased = torch.nn.ModuleList([clip])
    biased.register_parameter("bias", torch.nn.Parameter(torch.tensor(-2.0)))
    losses: dict[str, tuple[torch.nn.Module, Callable[[random.Random], torch.Tensor]]] = {
        "clip": (biased, lambda rng: caption_loss(clip, tokenizer, biased.bias, rng)),
        "vit": (vit, lambda rng: figure_loss(vit, rng)),
    }
    for name, (module, loss) in losses.items():
        trainer = Trainer(module, LEARNING_RATE, steps)
        trainer.run(lambda step, name=name, loss=loss: loss(random.Random(f"{name} {seed} {step}")), f"judge, {name}")
        trainer.settle()
    rounded([clip, vit])
    sides = {"height": SIZE, "width": SIZE}
    clip.half().save_pretrained(folder / "clip")
    CLIPImageProcessor(
        size={"shortest_edge": SIZE}, crop_size=sides, image_mean=_HALF, image_std=_HALF
    ).save_pretrained(folder / "clip")
    vit.half().save_pretrained(folder / "vit")
    ViTImageProcessor(size=sides, image_mean=_HALF, image_std=_HALF).save_pretrained(folder / "vit")


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = Parser(description="Train the feature models that judge pictures of the world.")
    parser.add_argument("--output", type=Path, required=True, help="directory to make")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything (default 0)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"steps of each model (default {STEPS})")
    try:
        options = parser.parse_args(arguments)
        if options.steps < 1:
            raise UserError(f"--steps={options.steps} is not a positive number; train for one step or more.")
        with new_directory(options.output, "--output") as aside:
            train_judge(aside, options.seed, options.steps)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.status
    except OSError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
