"""The step's arithmetic against a plain computation from the library's parts, and the random numbers it is given.

The plain computation shares neither code nor data path with the engine: pictures are encoded by the VAE itself, prompts
by the pipeline, sigmas looked up by the value of the timestep, losses summed row by row; a LoRA is merged into the
weights and its gradients follow from those of the merged weights by the chain rule.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from PIL import Image
from torchvision import transforms

from native_parts import loader, options
from sd3.native.model import Trained
from sd3.native.step import Batch, Draws, FlowMatching, draw

SEED = 7
PRIOR_WEIGHT = 0.7
SCHEMES = ("sigma_sqrt", "logit_normal", "mode", "cosmap")
LOSS_TOLERANCE = 1e-5  # relative
GRADIENT_TOLERANCE = 1e-4  # distance of each parameter's gradient, relative to its norm ...
NEGLIGIBLE = 1e-6  # ... or to the norm of the whole gradient: some are zero but for rounding, as of a key's bias
PIXELS = transforms.Compose(
    [
        transforms.Resize(64, transforms.InterpolationMode.BILINEAR),
        transforms.CenterCrop(64),
        transforms.ToTensor(),
        transforms.Normalize([0.5], [0.5]),
    ]
)

MODES = {
    "full": ("full", ()),
    "lora": ("lora", ()),
    "full with text encoders": ("full", ("--train_text_encoder",)),
    "lora with text encoders": ("lora", ("--train_text_encoder",)),
}


class Result(NamedTuple):
    """A loss and its gradients by parameter."""

    loss: float
    gradients: dict[str, torch.Tensor]


def distance(ours: Result, plain: Result) -> float:
    """How far apart two results are: at most 1 where they agree."""
    assert ours.gradients.keys() == plain.gradients.keys()
    assert ours.gradients
    whole = math.sqrt(sum(gradient.square().sum().item() for gradient in plain.gradients.values()))
    distances = [abs(ours.loss - plain.loss) / (LOSS_TOLERANCE * abs(plain.loss))]
    for name, gradient in plain.gradients.items():
        allowed = GRADIENT_TOLERANCE * gradient.norm().item() + NEGLIGIBLE * whole
        distances.append((ours.gradients[name] - gradient).norm().item() / allowed)
    return max(distances)


class Engine:
    """The engine's model of one entry point, and what it makes of the first batch of a run."""

    def __init__(self, kind: str, flags: tuple[str, ...], model: Path) -> None:
        self.kind, self.flags, self.model = kind, flags, model
        self.trained = Trained(options(*flags, kind=kind), kind, model, torch.float32)
        if self.trained.lora:  # half of a LoRA begins as zeros, and would hide the other half's gradients
            generator = torch.Generator().manual_seed(SEED)
            for parameter in self.trained.parameters():
                torch.nn.init.normal_(parameter, std=0.2, generator=generator)

    def step(self, *flags: str) -> tuple[list[int], Draws, Result]:
        """Numbers of the batch's pictures, its draws, loss and gradients."""
        given = options(*self.flags, *flags, kind=self.kind)
        feed = loader(given, self.model)
        (batch,) = feed.batches(0, 0, 1)
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(self.model / "scheduler")
        vae = AutoencoderKL.load_config(self.model / "vae")
        flow = FlowMatching(
            given, scheduler, vae["shift_factor"], vae["scaling_factor"], torch.float32, torch.device("cpu")
        )
        draws = draw(given, SEED, batch, 1000)
        self.trained.denoiser.zero_grad()
        torch.manual_seed(SEED)  # T5 in training has dropout
        loss = flow.loss(self.trained.denoiser, batch, draws)
        loss.backward()
        gradients = {
            name: one.grad.clone() for name, one in zip(self.trained.names(), self.trained.parameters(), strict=True)
        }
        numbers = [feed.samples.stream.sample(position) for position in batch.positions]
        return numbers, draws, Result(loss.item(), gradients)


class Plain:
    """The same model, put together from the library's parts."""

    def __init__(self, engine: Engine) -> None:
        self.trained = engine.trained
        self.pipeline = StableDiffusion3Pipeline.from_pretrained(engine.model)
        self.parts = {name: getattr(self.pipeline, name) for name in self.trained.parts}
        for part in self.parts.values():
            part.requires_grad_(True)
            part.train(not self.trained.lora)
        self.low_rank: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        if self.trained.lora:
            self._merge()

    def _merge(self) -> None:
        """Add each product of low-rank matrices to the weight that it belongs to."""
        for name, module in self.trained.parts.items():
            found = {key: value.detach() for key, value in module.named_parameters() if ".lora_" in key}
            for key in found:
                weight, _, rest = key.partition(".lora_A.")
                if rest:
                    down, up = found[key], found[key.replace("lora_A", "lora_B")]
                    self.parts[name].get_parameter(f"{weight}.weight").data += up @ down
                    self.low_rank[f"{name}.{weight}"] = down, up

    def step(
        self, pictures: list[Image.Image], captions: list[str], draws: Draws, scheme: str, precondition: bool,
        prior_weight: float | None, fault: str = "",
    ) -> Result:  # fmt: skip
        """Loss and gradients; with `prior_weight` the second half are class pictures. `fault` makes it wrong."""
        pipeline, table = self.pipeline, self.pipeline.scheduler
        if fault == "another shift":
            table = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)
        vae = pipeline.vae
        with torch.no_grad():
            encoded = vae.encode(torch.stack([PIXELS(picture.convert("RGB")) for picture in pictures])).latent_dist
        shift = 0.0 if fault == "no shift factor" else vae.config.shift_factor
        latents = (encoded.mean + encoded.std * draws.sampling - shift) * vae.config.scaling_factor

        times = table.timesteps[draws.indices]
        sigmas = torch.stack([table.sigmas[:1000][table.timesteps == time][0] for time in times])
        noisy = torch.stack([(1 - s) * x + s * n for s, x, n in zip(sigmas, latents, draws.noise, strict=True)])

        for part in self.parts.values():
            part.zero_grad()
        torch.manual_seed(SEED)
        if fault == "captions of one another":
            captions = [captions[1], captions[0], *captions[2:]]
        prompt, _, pooled, _ = pipeline.encode_prompt(
            captions, captions, captions, do_classifier_free_guidance=False, max_sequence_length=77
        )
        velocities = pipeline.transformer(noisy, prompt, pooled, times, return_dict=False)[0]

        weights = compute_loss_weighting_for_sd3(scheme, sigmas)
        half = len(weights) // 2
        if fault == "weights of the first half for both":
            weights = weights[:half].repeat(2)
        rows = []
        for s, x, n, z, v, w in zip(sigmas, latents, draws.noise, noisy, velocities, weights, strict=True):
            if fault == "noise for data":
                x, n = n, x
            difference = z - s * v - x if precondition else v - (n - x)
            rows.append(w * difference.square().mean())
        if prior_weight is None:
            loss = torch.stack(rows).mean()
        else:
            loss = torch.stack(rows[:half]).mean() + prior_weight * torch.stack(rows[half:]).mean()
        loss.backward()
        return Result(loss.item(), self._gradients())

    def _gradients(self) -> dict[str, torch.Tensor]:
        if not self.trained.lora:
            named = [(f"{part}.{key}", value) for part in self.parts for key, value in self._named(part)]
            return {name: value.grad.clone() for name, value in named}
        found = {}
        for name, (down, up) in self.low_rank.items():
            part, _, weight = name.partition(".")
            gradient = self.parts[part].get_parameter(f"{weight}.weight").grad
            found[f"{name}.lora_A.default.weight"] = up.T @ gradient
            found[f"{name}.lora_B.default.weight"] = gradient @ down.T
        return found

    def _named(self, part: str) -> list[tuple[str, torch.nn.Parameter]]:
        return list(self.parts[part].named_parameters())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, pokemon_dir: Path, dog_dir: Path) -> dict[str, Any]:
    """Captioned pictures and class pictures, as flags and as they are."""
    rows = pyarrow.parquet.read_table(next(pokemon_dir.glob("data/*.parquet"))).to_pylist()
    folder = tmp_path_factory.mktemp("step")
    flags = (f"--dataset_name={pokemon_dir}", "--caption_column=text", f"--cache_dir={folder / 'datasets'}")
    flags += (f"--precompute_dir={folder / 'cache'}",)
    flags += ("--resolution=64", "--train_batch_size=2", f"--seed={SEED}", "--center_crop")
    prior = ("--with_prior_preservation", f"--class_data_dir={dog_dir}", "--class_prompt=a dog of another kind")
    return {
        "flags": flags,
        "instance": [(Image.open(io.BytesIO(row["image"]["bytes"])), row["text"]) for row in rows],
        "prior": (*prior, f"--prior_loss_weight={PRIOR_WEIGHT}", "--num_class_images=4"),
        "class": [(Image.open(file), "a dog of another kind") for file in sorted(dog_dir.iterdir())[:4]],
    }


@pytest.fixture(scope="module")
def models(tiny_model: Path) -> Callable[[str], tuple[Engine, Plain]]:
    """The engine's and the plain model of a mode, made once."""
    made: dict[str, tuple[Engine, Plain]] = {}

    def get(mode: str) -> tuple[Engine, Plain]:
        if mode not in made:
            engine = Engine(*MODES[mode], tiny_model)
            made[mode] = engine, Plain(engine)
        return made[mode]

    return get


def compared(
    models: tuple[Engine, Plain], data: dict[str, Any], scheme: str, precondition: bool, prior: bool, fault: str = ""
) -> float:
    """Distance of the engine's step from the plain one."""
    engine, plain = models
    flags = (f"--weighting_scheme={scheme}", f"--precondition_outputs={precondition:d}")
    numbers, draws, ours = engine.step(*data["flags"], *flags, *(data["prior"] if prior else ()))
    rows = [data["instance"][number % len(data["instance"])] for number in numbers]
    if prior:
        rows += [data["class"][number % len(data["class"])] for number in numbers]
    pictures, captions = zip(*rows, strict=True)
    weight = PRIOR_WEIGHT if prior else None
    return distance(ours, plain.step(list(pictures), list(captions), draws, scheme, precondition, weight, fault))


EVERY = [
    (scheme, precondition, prior) for scheme in SCHEMES for precondition in (True, False) for prior in (False, True)
]
SOME = [("sigma_sqrt", True, True), ("logit_normal", False, False), ("mode", True, False), ("cosmap", False, True)]
# Each with a case in which it shows.
FAULTS = {
    "another shift": ("logit_normal", True, False),
    "no shift factor": ("logit_normal", True, False),
    "captions of one another": ("mode", True, False),
    "weights of the first half for both": ("sigma_sqrt", False, True),
    "noise for data": ("cosmap", False, False),
}


@pytest.mark.parametrize(("mode", "cases"), [(mode, EVERY if mode == "lora" else SOME) for mode in MODES])
def test_loss_and_every_gradient_are_those_of_a_plain_computation(
    mode: str, cases: list[tuple[str, bool, bool]], models: Callable, data: dict[str, Any]
) -> None:
    for case in cases:
        assert compared(models(mode), data, *case) < 1, case


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_rejects_faults(mode: str, fault: str, models: Callable, data: dict[str, Any]) -> None:
    assert compared(models(mode), data, *FAULTS[fault], fault) > 100


def drawn(positions: list[int], *flags: str, seed: int = SEED) -> Draws:
    """The draws of a batch with samples at these positions."""
    given = options(*flags)
    rows = len(positions) * (2 if given.with_prior_preservation else 1)
    shape = torch.zeros(rows, 16, 2, 2)
    return draw(given, seed, Batch(shape, shape, (), positions), 1000)


PRIOR = ("--with_prior_preservation", "--class_data_dir=c", "--class_prompt=c")


def test_a_samples_draws_depend_on_seed_and_position_alone() -> None:
    torch.manual_seed(1)
    together = drawn([5, 2, 9])
    torch.manual_seed(2)
    alone, with_class = drawn([9]), drawn([9, 5], *PRIOR)
    for whole, one, halves in zip(together, alone, with_class, strict=True):
        assert torch.equal(whole[2:], one)
        assert torch.equal(halves[:2], whole[[2, 0]])
        assert not torch.equal(halves[2:], halves[:2])  # a class picture's are its own
    for whole, other in zip(together, drawn([5, 2, 9], seed=SEED + 1), strict=True):
        assert not torch.equal(whole, other)
    # The latents' own noise is not the noise that is added.
    assert not any(torch.equal(one, other) for one in together.noise for other in together.sampling)


def test_drawing_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    drawn([0, 1])
    assert torch.equal(torch.get_rng_state(), before)


def test_noise_is_standard_normal() -> None:
    draws = drawn(list(range(1000)))
    for noise in (draws.noise, draws.sampling):
        assert noise.dtype == torch.float32
        values = noise.flatten().double()  # 64000, so that a mean's deviation is 0.004
        assert values.mean().abs() < 0.016
        assert values.square().mean() == pytest.approx(1, abs=0.023)
        assert values.pow(4).mean() == pytest.approx(3, abs=0.16)
        neighbours = torch.corrcoef(noise.flatten(1)[:, :2].T.double())[0, 1]
        rows = torch.corrcoef(torch.stack([noise[:-1].flatten(), noise[1:].flatten()]).double())[0, 1]
        assert neighbours.abs() < 0.13 and rows.abs() < 0.016
    assert torch.corrcoef(torch.stack([draws.noise.flatten(), draws.sampling.flatten()]))[0, 1].abs() < 0.016


def kolmogorov_smirnov(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest distance between two samples' distribution functions, in units of its 0.1 % critical value."""
    values = torch.cat([one, other]).sort().values
    shares = [torch.searchsorted(sample.sort().values, values, right=True) / len(sample) for sample in (one, other)]
    critical = 1.95 * math.sqrt(1 / len(one) + 1 / len(other))
    return (shares[0] - shares[1]).abs().max().item() / critical


NORMAL = ("--weighting_scheme=logit_normal", "--logit_mean=0.2", "--logit_std=0.8")


@pytest.mark.parametrize(
    ("flags", "other"),
    [
        (("--weighting_scheme=sigma_sqrt",), ("--weighting_scheme=mode", "--mode_scale=-0.3")),
        (("--weighting_scheme=cosmap",), ("--weighting_scheme=logit_normal", "--logit_std=1.5")),
        (("--weighting_scheme=mode", "--mode_scale=0.8"), ("--weighting_scheme=mode", "--mode_scale=1.29")),
        (NORMAL, (*NORMAL, "--logit_mean=0")),
    ],
)
def test_timesteps_have_the_schemes_distribution(flags: tuple[str, ...], other: tuple[str, ...]) -> None:
    given, count = options(*flags), 4000
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        settings = (given.weighting_scheme, 10 * count, given.logit_mean, given.logit_std, given.mode_scale)
        expected = (compute_density_for_timestep_sampling(*settings) * 1000).long()
    assert kolmogorov_smirnov(drawn(list(range(count)), *flags).indices, expected) < 1
    assert kolmogorov_smirnov(drawn(list(range(count)), *other).indices, expected) > 1


@pytest.mark.parametrize("flags", [("--logit_std=20",), ("--weighting_scheme=mode", "--mode_scale=-4")])
def test_a_density_that_leaves_the_table_takes_its_ends(flags: tuple[str, ...]) -> None:
    indices = drawn(list(range(500)), *flags).indices
    assert (indices == 999).sum() > 10
    assert indices.min() >= 0 and indices.max() == 999


def test_a_mean_below_0_draws_more_noise() -> None:
    """As the flag's help says."""
    sigmas = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0).sigmas
    noise = [sigmas[drawn(list(range(500)), f"--logit_mean={mean}").indices].mean() for mean in (-1, 0, 1)]
    assert noise[0] > noise[1] + 0.1 and noise[1] > noise[2] + 0.1


SHIFT, SCALE = 0.06, 1.5
ROUNDED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def flow_and_batch(dtype: torch.dtype, *flags: str) -> tuple[FlowMatching, Batch, Draws]:
    """A batch with a row for every timestep, whose latent distributions are points."""
    generator = torch.Generator().manual_seed(SEED)
    mean, noise = (torch.randn(1000, 16, 2, 2, generator=generator) for _ in range(2))
    batch = Batch(mean, torch.full_like(mean, -30.0), (), list(range(1000)))
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
    flow = FlowMatching(options(*flags), scheduler, SHIFT, SCALE, dtype, torch.device("cpu"))
    return flow, batch, Draws(torch.zeros_like(mean), noise, torch.arange(1000))


@pytest.mark.parametrize("precondition", [1, 0])
@pytest.mark.parametrize("dtype", ROUNDED)
def test_an_exact_velocity_has_no_loss_with_sigma_sqrt(dtype: str, precondition: int) -> None:
    """Its weight is 110,000 at the lowest sigma, where rounding to bfloat16 alone made a loss of more than 1."""
    flags = ("--weighting_scheme=sigma_sqrt", f"--precondition_outputs={precondition}")
    flow, batch, draws = flow_and_batch(ROUNDED[dtype], *flags)
    velocity = draws.noise - (batch.mean - SHIFT) * SCALE
    seen: list[torch.Tensor] = []

    def exact(noisy: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        seen.append(noisy)
        return velocity

    assert flow.loss(exact, batch, draws).item() < 1e-5
    assert seen[0].dtype == ROUNDED[dtype]
    if precondition:  # the transformer's own rounding is not magnified either
        assert flow.loss(lambda *_: velocity.to(ROUNDED[dtype]), batch, draws).item() < 1e-4
    wrong = flow.loss(lambda *_: velocity + 0.1, batch, draws).item()
    assert wrong == pytest.approx(0.01 if precondition else 0.01 * (flow.sigmas[:1000] ** -2).mean().item(), rel=0.05)


@pytest.mark.parametrize("precondition", [1, 0])
@pytest.mark.parametrize(("scheme", "dtype"), [
    *((scheme, dtype) for scheme in ("logit_normal", "mode", "cosmap") for dtype in ROUNDED), ("sigma_sqrt", "float32"),
])  # fmt: skip
def test_other_losses_have_the_bits_of_arithmetic_in_the_latents_dtype(
    scheme: str, dtype: str, precondition: int
) -> None:
    kind = ROUNDED[dtype]
    flow, batch, draws = flow_and_batch(kind, f"--weighting_scheme={scheme}", f"--precondition_outputs={precondition}")
    prediction = torch.randn(draws.noise.shape, generator=torch.Generator().manual_seed(1)).to(kind)
    x = ((batch.mean + torch.exp(0.5 * batch.logvar) * draws.sampling - SHIFT) * SCALE).to(kind)
    s, n = flow.sigmas[:1000].to(kind).view(-1, 1, 1, 1), draws.noise.to(kind)
    noisy = (1.0 - s) * x + s * n
    found, target = (prediction * (-s) + noisy, x) if precondition else (prediction, n - x)
    difference = found.float() - target.float()
    expected = (compute_loss_weighting_for_sd3(scheme, s).float() * difference.square()).mean()
    assert torch.equal(flow.loss(lambda *_: prediction, batch, draws), expected)
