"""Both engines side by side on the tiny model: the same losses from the same draws, like curves from different ones.

First the patched script is given the draws, the order and the initial LoRA of this engine, and each step's loss must be
this engine's. Then each engine draws for itself, and their loss curves over several seeds are compared by a statistic.
Both comparisons must reject this engine with a fault put in.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import math
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import DistributedType
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from safetensors.torch import load_file, save_file

import native_runs
from patching import SCRIPTS, scripts_without
from sd3.native.checkpoint import Checkpoints
from sd3.native.data import Loader
from sd3.native.model import Trained
from sd3.native.options import parse
from sd3.native.step import Batch, Draws, FlowMatching, draw
from sd3.native.stream import Stream

pytestmark = [pytest.mark.upstream, pytest.mark.long]
STEPS, BATCH, PICTURES, RATE = 50, 8, 8, 2e-3
LORA_FILE = "pytorch_lora_weights.safetensors"
CAPTIONS = ("red", "something blue and dark, seen from afar")

# With the same draws: largest relative difference of a step's loss. Rounding differs and grows from step to step.
SAME = 1e-4
# With other draws: the curves' logarithm in blocks of ten steps, engine against engine over the seeds, by Welch's t;
# the largest of five. With six seeds each, |t| > 6 has a probability below 2e-4, among five below 1e-3.
SEEDS, BLOCK, LIMIT = 6, 10, 6.0


# ---- model and data on which faults matter


@pytest.fixture(scope="module", autouse=True)
def _script(upstream_state: str) -> None:
    """Made and imported once, with what it imports, not in each fork."""
    if not upstream_state:
        for kind in SCRIPTS:
            script(kind)
        with contextlib.suppress(ImportError):
            importlib.import_module("deepspeed")  # as accelerate does in a run


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline with latents that are far from zero, unlike each other, and not lost in the VAE's own noise."""
    folder = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("upstream") / "model"))
    config = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
    (folder / "vae" / "config.json").write_text(json.dumps(config | {"shift_factor": 0.6}), encoding="utf-8")
    (file,) = (folder / "vae").glob("*.safetensors")
    weights = load_file(file)
    weights["encoder.conv_out.weight"][:16] *= 3
    weights["encoder.conv_out.bias"][16:] -= 4  # of the log-variances
    save_file(weights, file, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Eight pictures of two colours, each colour with a caption; as large as they are trained on, so never cropped."""
    import datasets

    folder = tmp_path_factory.mktemp("pictures")
    colours = [((240 - 4 * number, 20, 30), (10, 20 + 4 * number, 200))[number % 2] for number in range(PICTURES)]
    pictures = []
    for colour in colours:
        content = io.BytesIO()
        Image.new("RGB", (64, 64), colour).save(content, "PNG")
        pictures.append({"bytes": content.getvalue(), "path": None})
    rows = {"image": pictures, "text": [CAPTIONS[number % 2] for number in range(PICTURES)]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "set" / "train.parquet")
    return [f"--dataset_name={folder / 'set'}", "--caption_column=text", f"--cache_dir={folder / 'cache'}"]


# High noise, where the caption tells what the noisy latents do not, and little spread of it between draws.
SETTINGS = (
    f"--max_train_steps={STEPS}", f"--train_batch_size={BATCH}", f"--learning_rate={RATE}", "--rank=16",
    "--logit_mean=-2", "--logit_std=0.3", "--precondition_outputs=1", "--weighting_scheme=logit_normal",
    "--checkpointing_steps=1000",
)  # fmt: skip


def settings(kind: str, seed: int) -> list[str]:
    return [f"--seed={seed}", *(one for one in SETTINGS if kind == "lora" or not one.startswith("--rank"))]


# ---- the two engines


def script(kind: str) -> types.ModuleType:
    """The patched script, imported anew."""
    spec = importlib.util.spec_from_file_location("upstream_script", scripts_without(None) / SCRIPTS[kind])
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Upstream:
    """Runs the patched script in a fork; `change` may put its own hand in first."""

    def __init__(self, change: Callable[[types.ModuleType], None] | None = None) -> None:
        self.change = change

    def __call__(self, kind: str, line: list[str]) -> int:
        module = script(kind)
        module.args = module.parse_args([one for one in line if not one.startswith("--precompute_dir=")])
        if self.change is not None:
            self.change(module)
        module.main(module.args)
        return 0


def curve(kind: str, output: Path, model: Path, data: list[str], *arguments: str, **how: Any) -> list[float]:
    """The losses of a run."""
    process = native_runs.forked(kind, output, model, data, *arguments, **how)
    assert native_runs.finished(process, 600) == 0, native_runs.log_of(output).read_text()
    found = native_runs.losses(output)
    assert sorted(found) == list(range(1, STEPS + 1))
    return [found[step] for step in range(1, STEPS + 1)]


def same_lora() -> None:
    """Have low-rank matrices begin as the same ones in both engines."""
    plain = SD3Transformer2DModel.add_adapter

    def add_adapter(self: SD3Transformer2DModel, *arguments: Any, **keywords: Any) -> None:
        torch.manual_seed(11)
        plain(self, *arguments, **keywords)

    SD3Transformer2DModel.add_adapter = add_adapter


class NativeDraws:
    """Gives the patched script this engine's order of the pictures and its draws."""

    def __init__(self, kind: str, line: list[str]) -> None:
        self.given = parse(kind, ["--pretrained_model_name_or_path=m", "--instance_prompt=p", *line])

    def draws(self) -> Iterator[Draws]:
        shape = torch.zeros(BATCH, 16, 8, 8)
        for step in range(STEPS):
            positions = list(range(step * BATCH, (step + 1) * BATCH))
            yield draw(self.given, self.given.seed, Batch(shape, shape, (), positions), 1000)

    def __call__(self, module: types.ModuleType) -> None:
        same_lora()
        seed, all_draws = self.given.seed, list(self.draws())
        sampling, noise = iter([one.sampling for one in all_draws]), iter([one.noise for one in all_draws])
        indices = iter([one.indices for one in all_draws])
        stream = Stream(seed, PICTURES, BATCH, 1, 1)
        order = torch.tensor([stream.sample(position) for position in range(STEPS * BATCH)]).view(-1, PICTURES)
        plain_permutation, plain_noise = torch.randperm, torch.randn_like

        def permutation(length: int, *, generator: torch.Generator | None = None, **keywords: Any) -> torch.Tensor:
            if generator is None:
                return plain_permutation(length, **keywords)
            return order[generator.initial_seed() - seed]  # it is seeded anew for each epoch

        torch.randperm = permutation
        torch.randn_like = lambda one, *rest, **more: next(noise) if one.ndim == 4 else plain_noise(one, *rest, **more)
        DiagonalGaussianDistribution.sample = lambda self: self.mean + self.std * next(sampling)
        module.compute_density_for_timestep_sampling = lambda **_: (next(indices) + 0.5) / 1000


# ---- faults of this engine


def another_shift() -> None:
    plain = FlowMatching.__init__

    def init(self: FlowMatching, options: Any, scheduler: Any, *rest: Any) -> None:
        plain(self, options, FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0), *rest)

    FlowMatching.__init__ = init


def no_shift_factor() -> None:
    plain = FlowMatching.__init__

    def init(self: FlowMatching, options: Any, scheduler: Any, shift: float, *rest: Any) -> None:
        plain(self, options, scheduler, 0.0, *rest)

    FlowMatching.__init__ = init


def swapped_captions() -> None:
    """Each picture of a batch has its neighbour's. (Always the other colour's could be learned as well as its own.)"""
    plain = Loader._collate

    def collate(self: Loader, batch: Any) -> Any:
        *rest, rows = plain(self, batch)
        return *rest, rows.roll(1)

    Loader._collate = collate


FAULTS: dict[str, tuple[Callable[[], None] | None, tuple[str, ...]]] = {
    "another shift": (another_shift, ()),
    "no shift factor": (no_shift_factor, ()),
    "swapped captions": (swapped_captions, ()),
    "learning rate": (None, (f"--learning_rate={1.5 * RATE}",)),
}


def faulty(name: str, before: Callable[[], None] | None = None) -> tuple[Callable[[], None], tuple[str, ...]]:
    """What is done ahead of a run with this fault ("" for none), and its flags."""
    fault, flags = FAULTS[name] if name else (None, ())

    def both() -> None:
        for one in (before, fault):
            if one is not None:
                one()

    return both, flags


# ---- the same draws


def apart(one: list[float], other: list[float]) -> float:
    """Largest relative difference of a step's loss."""
    return max(abs(a - b) / abs(b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_same_draws_give_the_same_losses(
    kind: str, model: Path, data: list[str], upstream_checkout: Path, tmp_path: Path
) -> None:
    given = settings(kind, 5)
    entry = Upstream(NativeDraws(kind, [*data, *given]))
    expected = curve(kind, tmp_path / "upstream", model, data, *given, entry=entry)
    found = {}
    for name in ("", *FAULTS):
        before, flags = faulty(name, same_lora)
        output = tmp_path / f"native {name}"
        found[name] = apart(curve(kind, output, model, data, *given, *flags, before=before), expected)
    print(f"{kind}: losses {expected[0]:.3f} to {expected[-1]:.3f}; apart", found)
    assert found.pop("") < SAME
    assert all(distance > 10 * SAME for distance in found.values()), found


# ---- draws of their own


def statistic(one: torch.Tensor, other: torch.Tensor) -> float:
    """How far apart two sets of curves [seeds, steps] are: the largest |t| of their blocks of steps."""
    sides = [curves.unflatten(1, (-1, BLOCK)).mean(2).log() for curves in (one, other)]
    spread = sum(side.var(0) / len(side) for side in sides)
    return ((sides[0].mean(0) - sides[1].mean(0)) / spread.sqrt()).abs().max().item()


def test_draws_of_their_own_give_the_same_curves(
    model: Path, data: list[str], upstream_checkout: Path, tmp_path: Path
) -> None:
    def curves(name: str, **how: Any) -> torch.Tensor:
        before, flags = faulty(name)
        found = [
            curve("full", tmp_path / f"{name} {bool(how)}" / str(seed), model, data, *settings("full", seed), *flags,
                  before=before, **how)
            for seed in range(SEEDS)
        ]  # fmt: skip
        return torch.tensor(found, dtype=torch.float64)

    upstream = curves("", entry=Upstream())
    found = {name: statistic(curves(name), upstream) for name in ("", *FAULTS)}
    print("|t|", found)
    assert found.pop("") < LIMIT
    assert all(value > LIMIT for value in found.values()), found


def test_the_statistic_has_the_error_that_it_is_said_to_have() -> None:
    """On curves of noise around one mean it rejects as seldom as its limit promises, and finds a shift of the mean."""
    generator = torch.Generator().manual_seed(0)
    curves = torch.exp(0.1 * torch.randn(2000, 2, SEEDS, STEPS, generator=generator, dtype=torch.float64))
    alike = [statistic(one, other) for one, other in curves]
    assert sum(value > LIMIT for value in alike) <= 6  # 1e-3 of 2000, and chance
    assert sum(value > 4 for value in alike) > 6
    apart_by_chance = math.exp(0.2) * curves[:, 0]
    assert all(statistic(one, other) > 3 for one, other in zip(apart_by_chance[:50], curves[:50, 1], strict=True))


# ---- each other's LoRA


def test_a_lora_of_either_engine_loads_in_the_other(
    model: Path, data: list[str], upstream_checkout: Path, tmp_path: Path
) -> None:
    flags = [*settings("lora", 1), "--max_train_steps=2", "--train_text_encoder", "--text_encoder_lr=1e-2"]

    def run(name: str, *more: str, **how: Any) -> Path:
        process = native_runs.forked("lora", tmp_path / name, model, data, *flags, *more, **how)
        assert native_runs.finished(process, 600) == 0, native_runs.log_of(tmp_path / name).read_text()
        return tmp_path / name / LORA_FILE

    native, upstream = run("native"), run("upstream", "--checkpointing_steps=2", entry=Upstream())
    ours, theirs = load_file(native), load_file(upstream)
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}
    assert any(not torch.equal(value, theirs[key]) for key, value in ours.items())

    # Theirs in this engine's loader.
    given = parse("lora", [f"--pretrained_model_name_or_path={model}", "--instance_prompt=p", *data, *flags])
    trained = Trained(given, "lora", model, torch.float32)
    alone = types.SimpleNamespace(distributed_type=DistributedType.NO)
    Checkpoints(given, alone, trained, None, None, None)._load_weights(upstream.parent)
    trained.write_weights(tmp_path / "again")
    native_runs.assert_same(load_file(tmp_path / "again" / LORA_FILE), theirs)

    # This engine's in theirs: in the place of a checkpoint's, from which a run resumes that is at its end.
    shutil.copy(native, tmp_path / "upstream" / "checkpoint-2" / LORA_FILE)
    upstream.unlink()
    run("upstream", "--resume_from_checkpoint=latest", entry=Upstream())
    native_runs.assert_same(load_file(upstream), ours)
