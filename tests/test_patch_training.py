"""What is trained on: the symptom without each patch, and none with all."""

from __future__ import annotations

from pathlib import Path

import pytest

from patching import train

pytestmark = [pytest.mark.upstream, pytest.mark.long]
PRIOR = ("--with_prior_preservation", "--class_prompt=a photo of dog", "--num_class_images=4", "--seed=0")


@pytest.fixture(autouse=True)
def _checkout(upstream_checkout: Path) -> None:
    """Every test here needs it."""


@pytest.fixture
def dog(dog_dir: Path) -> list[str]:
    return [f"--instance_data_dir={dog_dir}"]


@pytest.fixture
def class_images(tmp_path: Path) -> str:
    from sd3.common.synthetic_data import make_dog

    make_dog(tmp_path / "class", images=4, seed=9)
    return f"--class_data_dir={tmp_path / 'class'}"


@pytest.mark.parametrize("without", ["0004", None])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_0004_seed_0_reaches_the_validation(
    tmp_path: Path, tiny_model: Path, dog: list[str], kind: str, without: str | None
) -> None:
    arguments = ("--max_train_steps=1", "--seed=0", "--validation_prompt=a dog", "--num_validation_images=1")
    run = train(kind, tmp_path / "out", tiny_model, dog, *arguments, without=without)
    assert run.status == 0, run.log
    assert {seed for _, _, seed in run.events("validation")} == {None if without else 0}


def solid_colours(folder: Path) -> tuple[list[str], dict[str, int]]:
    """Five pictures of one colour each, whatever the crop, captioned with their number."""
    import datasets
    from PIL import Image

    folder.mkdir()
    captions = [f"picture number {index}" for index in range(5)]
    images = [Image.new("RGB", (64, 64), (50 * index, 255 - 50 * index, (90 * index) % 255)) for index in range(5)]
    data = datasets.Dataset.from_dict(
        {"image": images, "text": captions},
        features=datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")}),
    )
    data.to_parquet(folder / "train.parquet")
    return [f"--dataset_name={folder}", "--caption_column=text"], {text: n for n, text in enumerate(captions)}


@pytest.mark.parametrize(("ranks", "without"), [(1, None), (2, None), (1, "0007")])
def test_0007_cached_latents_keep_their_captions(
    tmp_path: Path, tiny_model: Path, ranks: int, without: str | None
) -> None:
    import torch
    from diffusers import AutoencoderKL

    data, numbers = solid_colours(tmp_path / "data")
    arguments = ("--cache_latents", "--max_train_steps=10", "--seed=0")
    run = train("lora", tmp_path / "out", tiny_model, data, *arguments, without=without, ranks=ranks, precision="no")
    assert run.status == 0, run.log
    vae = AutoencoderKL.from_pretrained(tiny_model, subfolder="vae")
    sums = {}
    for number in numbers.values():
        colour = torch.tensor([50.0 * number, 255 - 50 * number, (90 * number) % 255])
        pixels = (colour / 255 * 2 - 1)[None, :, None, None].expand(1, 3, 64, 64)
        with torch.no_grad():
            sums[number] = vae.encode(pixels).latent_dist.mean.double().sum().item()
    pairs = []
    for rank in range(ranks):
        # Both CLIP tokenizers are given the prompts of a step.
        steps = [prompts for prompts in run.events("prompts", rank) if prompts[0] in numbers][::2]
        latents = run.events("latents", rank)[-len(steps) :]
        for prompts, means in zip(steps, latents, strict=True):
            nearest = min(sums, key=lambda number: abs(sums[number] - means[0]))
            pairs.append((numbers[prompts[0]], nearest))
    if without:
        assert any(caption != image for caption, image in pairs)
    else:
        assert len(pairs) == 10 * ranks
        assert all(caption == image for caption, image in pairs)
        assert {image for _, image in pairs} == set(numbers.values())


def test_0007_without_it_mixed_precision_cannot_cache(tmp_path: Path, tiny_model: Path, dog: list[str]) -> None:
    arguments = ("--cache_latents", "--max_train_steps=2")
    assert train("lora", tmp_path / "with", tiny_model, dog, *arguments).status == 0
    run = train("lora", tmp_path / "without", tiny_model, dog, *arguments, without="0007")
    assert run.status != 0
    assert "BFloat16" in run.log


@pytest.mark.parametrize("without", ["0008", "0017", None])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_0008_and_0017_prior_preservation_at_batch_2(
    tmp_path: Path, tiny_model: Path, dog: list[str], class_images: str, kind: str, without: str | None
) -> None:
    arguments = (*PRIOR, class_images, "--train_batch_size=2", "--max_train_steps=4")
    run = train(kind, tmp_path / "out", tiny_model, dog, *arguments, without=without)
    if without:
        assert run.status != 0
        assert "must match the size of tensor" in run.log
    else:
        assert run.status == 0, run.log
        # 0016: instance images alone are counted; 5 at batch 2 are 2, 2 and 1.
        assert [images for _, images in run.scalars("images")] == [2, 2, 1, 2]


@pytest.mark.parametrize("without", ["0009", None])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_0009_the_learning_rate_ends_where_the_run_does(
    tmp_path: Path, tiny_model: Path, dog: list[str], kind: str, without: str | None
) -> None:
    arguments = ("--num_train_epochs=2", "--lr_scheduler=linear")
    run = train(kind, tmp_path / "out", tiny_model, dog, *arguments, without=without, ranks=2)
    assert run.status == 0, run.log
    rates = [rate for _, rate in run.scalars("lr")]
    assert len(rates) == 6  # 5 images over 2 ranks are 3 steps an epoch
    if without:
        assert rates[-1] > 3e-4
    else:
        assert rates[-1] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("without", ["0010", None])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_0010_each_rank_draws_its_own_noise(
    tmp_path: Path, tiny_model: Path, dog: list[str], kind: str, without: str | None
) -> None:
    run = train(kind, tmp_path / "out", tiny_model, dog, "--max_train_steps=3", "--seed=0", without=without, ranks=2)
    assert run.status == 0, run.log
    equal = [a == b for a, b in zip(run.events("noise", 0), run.events("noise", 1), strict=True)]
    assert len(equal) == 3
    assert all(equal) if without else not any(equal)


@pytest.mark.parametrize("without", ["0016", None])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_0016_images_received_are_counted(
    tmp_path: Path, tiny_model: Path, dog: list[str], kind: str, without: str | None
) -> None:
    arguments = ("--train_batch_size=8", "--max_train_steps=2")
    run = train(kind, tmp_path / "out", tiny_model, dog, *arguments, without=without)
    assert run.status == 0, run.log
    assert [images for _, images in run.scalars("images")] == ([] if without else [5, 5])
