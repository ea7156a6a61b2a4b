"""The two models that judge pictures of the tiny world, and what they learn from: a CLIP and a vision transformer."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.nn import ModuleDict
from torch.nn.functional import avg_pool2d, cross_entropy, normalize, pad, softplus
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from sd3.common.tiny_tokenizers import write_clip_tokenizer
from sd3.tiny_world import judge_world
from sd3.tiny_world.autoencoder import as_tensor
from sd3.tiny_world.grammar import rare_word, with_rare_word
from sd3.tiny_world.loop import Trainer, rounded, seeded
from sd3.tiny_world.render import SIZE

GROUPS, ALIKE = 16, 4  # a batch of CLIP: so many groups of pictures that differ in one thing
FIGURES = 8  # of the vision transformer: so many groups of ALIKE figures, two pictures of each
CLIP_STEPS, VIT_STEPS = 2000, 2000
LEARNING_RATE = 2e-3
TEMPERATURE = 0.1
WIDTH, PROJECTION = 64, 48  # numbers of the vision transformers' and of CLIP's features
_RARE = 0.05  # share of captions with a rare word, which the tokenizer spells
_VISION = {
    "image_size": SIZE, "patch_size": 8, "hidden_size": WIDTH, "num_attention_heads": 4, "intermediate_size": 192,
}  # fmt: skip
# Pixels of -1 to 1, as in training.
_PIXELS = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def make_clip(rows: int) -> CLIPModel:
    """A CLIP with fresh weights for a vocabulary of `rows` tokens, the last two of which begin and end a text."""
    text = {
        "vocab_size": rows, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "bos_token_id": rows - 2, "eos_token_id": rows - 1, "pad_token_id": rows - 1,
    }  # fmt: skip
    vision = {**_VISION, "num_hidden_layers": 3}
    return _spread(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=PROJECTION)))


def make_vit() -> ViTModel:
    """A vision transformer with a class token and fresh weights."""
    config = ViTConfig(
        **_VISION, num_hidden_layers=4, initializer_range=0.1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )  # fmt: skip
    return _spread(ViTModel(config, add_pooling_layer=False))


class Questions(torch.nn.Module):
    """What a feature should tell, asked by linear layers that are thrown away.

    Contrast alone finds all that tells pictures apart too, but in many more steps.
    """

    def __init__(self, width: int, classes: Sequence[int]) -> None:
        """`classes`: how many answers each question has."""
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(width, number) for number in classes)

    def forward(self, features: torch.Tensor, labels: Sequence[Sequence[int]]) -> torch.Tensor:
        """The mean cross entropy of the answers from features [B, width], with labels [B, questions]."""
        rows = torch.tensor(labels)
        return torch.stack([cross_entropy(ask(features), rows[:, i]) for i, ask in enumerate(self.layers)]).mean()


def _spread(model: torch.nn.Module) -> torch.nn.Module:
    """Make fresh embeddings of tokens and places as large as what is added to them; the default is for wide models."""
    for name, weight in model.named_parameters():
        if "embedding" in name and weight.ndim < 4 and not name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.2)
    return model


def weathered(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pictures [B, 3, H, W] with some blur and noise, for what is judged is painted, not drawn."""
    blur, noise = torch.rand(2, len(pixels), 1, 1, 1, generator=generator)
    soft = avg_pool2d(pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    flaws = torch.randn(pixels.shape, generator=generator)
    return (torch.lerp(pixels, soft, blur) + 0.1 * noise.square() * flaws).clamp(-1, 1)


def contrast(logits: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """InfoNCE (van den Oord et al. 2018, arXiv:1807.03748, equation 4), a mean over the true pairs of each row.

    `logits` and `true` are [rows, columns]; a row's true columns do not count as each other's negatives.
    """
    negatives = logits.masked_fill(true, -1e4).logsumexp(1, keepdim=True)
    return ((softplus(negatives - logits) * true).sum(1) / true.sum(1)).mean()


def both_ways(logits: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """The mean of the loss of rows and of columns, as CLIP has it (Radford et al. 2021, arXiv:2103.00020, figure 3)."""
    return (contrast(logits, true) + contrast(logits.T, true.T)) / 2


def _fit(
    model: torch.nn.Module, loss_at: Callable[[int, torch.Generator], torch.Tensor], name: str, seed: int, steps: int
) -> list[float]:
    """Train in place; leaves the moving average of the weights, rounded to float16. Returns the losses."""
    trainer = Trainer(model, LEARNING_RATE, steps)
    generator = torch.Generator().manual_seed(seed)
    trainer.run(lambda step: loss_at(step, generator), name)
    trainer.settle()
    rounded([model])
    return trainer.losses


def _captions(told: list[judge_world.Facts], rng: random.Random) -> list[str]:
    captions = [judge_world.caption_of(facts, rng) for facts in told]
    return [with_rare_word(one, rare_word(rng)) if rng.random() < _RARE else one for one in captions]


def train_clip(folder: Path, seed: int, steps: int = CLIP_STEPS) -> list[float]:
    """Train a CLIP on pictures with captions and write it, with tokenizer and image processor, to `folder`.

    A caption that is true of another picture of the batch makes a pair with it too. Returns the losses.
    """
    rows = write_clip_tokenizer(folder, judge_world.words())
    tokenizer = AutoTokenizer.from_pretrained(folder, clean_up_tokenization_spaces=True)
    classes = [len(values) + 1 for values in judge_world.VALUES.values()]
    student = seeded(
        lambda: ModuleDict(
            {"model": make_clip(rows), "seen": Questions(PROJECTION, classes), "read": Questions(PROJECTION, classes)}
        ),
        seed,
    )
    model = student["model"]

    def loss_at(step: int, generator: torch.Generator) -> torch.Tensor:
        rng = random.Random(f"judge clip {seed} {step}")
        shown, told = [], []
        for _ in range(GROUPS):
            facts, named = judge_world.draw_facts(rng), judge_world.draw_named(rng)
            group = [facts, *(judge_world.changed(facts, rng) for _ in range(ALIKE - 1))]
            shown += group
            told += [judge_world.told(one, named, rng) for one in group]
        pixels = weathered(as_tensor([judge_world.picture_of(facts, rng) for facts in shown]), generator)
        tokens = tokenizer(_captions(told, rng), padding=True, return_tensors="pt")
        pictures, texts = model.get_image_features(pixel_values=pixels), model.get_text_features(**tokens)
        logits = model.logit_scale.exp() * normalize(texts, dim=-1) @ normalize(pictures, dim=-1).T
        return (
            both_ways(logits, torch.from_numpy(judge_world.fits(told, shown)))
            + student["seen"](pictures, [judge_world.labels(facts) for facts in shown])
            + student["read"](texts, [judge_world.labels(facts) for facts in told])
        )

    losses = _fit(student, loss_at, "CLIP", seed, steps)
    size = {"height": SIZE, "width": SIZE}
    CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=size, **_PIXELS).save_pretrained(folder)
    model.half().save_pretrained(folder)
    return losses


def train_vit(folder: Path, seed: int, steps: int = VIT_STEPS) -> list[float]:
    """Train a vision transformer to know a figure wherever it is, and write it with its image processor to `folder`.

    The contrast is of the class token itself, with no head between. Returns the losses.
    """
    classes = [len(judge_world.VALUES[name]) for name in judge_world.LOOK]
    student = seeded(
        lambda: ModuleDict({"model": make_vit(), "look": Questions(_VISION["hidden_size"], classes)}), seed
    )
    model = student["model"]
    true = torch.eye(FIGURES * ALIKE, dtype=torch.bool)

    def loss_at(step: int, generator: torch.Generator) -> torch.Tensor:
        rng = random.Random(f"judge vit {seed} {step}")
        figures = []
        for _ in range(FIGURES):
            figure = judge_world.draw_look(rng)
            figures += [figure, *(judge_world.altered(figure, rng) for _ in range(ALIKE - 1))]
        views = [judge_world.view_of(figure, rng) for figure in figures * 2]
        tokens = model(pixel_values=weathered(as_tensor(views), generator)).last_hidden_state[:, 0]
        first, second = normalize(tokens, dim=-1).chunk(2)
        looks = [judge_world.look_labels(figure) for figure in figures * 2]
        return both_ways(first @ second.T / TEMPERATURE, true) + student["look"](tokens, looks)

    losses = _fit(student, loss_at, "vision transformer", seed, steps)
    ViTImageProcessor(size={"height": SIZE, "width": SIZE}, **_PIXELS).save_pretrained(folder)
    model.half().save_pretrained(folder)
    return losses
