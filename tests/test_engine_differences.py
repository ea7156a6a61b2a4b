"""What the table in sd3/native/README.md says of both engines, side by side."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

import native_runs
from native_parts import options
from patching import IMAGE_SIZE, data_set, noise, train
from sd3.native.pictures import class_samples, instance_samples
from sd3.native.stream import Stream

pytestmark = pytest.mark.upstream
LORA_RUN = ("--gradient_accumulation_steps=2", "--max_train_steps=3", "--train_batch_size=2", "--seed=0")


@pytest.fixture(autouse=True)
def _checkout(upstream_checkout: Path) -> None:
    """Every test here needs it."""


def folder_of(place: Path, *names: str) -> Path:
    place.mkdir()
    for number, name in enumerate(names):
        noise("RGB", number).save(place / name)
    return place


def test_flips_are_drawn_once_or_each_time(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "images", *(f"{number}.png" for number in range(8)))
    random.seed(3)
    patched = data_set("lora", folder=folder, random_flip=True)
    plain = data_set("lora", folder=folder)
    shown = [[torch.equal(patched[n]["instance_images"], plain.pixel_values[n]) for n in range(8)] for _ in range(3)]
    assert shown[0] == shown[1] == shown[2]
    assert set(shown[0]) == {True, False}
    # The native engine keeps both views, of which each showing takes one.
    native = instance_samples(options(f"--instance_data_dir={folder}", "--random_flip"))
    assert {tuple(view.flip for view in sample.views) for sample in native} == {(False, True)}


def test_class_images_are_cropped_anew_or_once(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "images", "a.png")
    patched = data_set("full", folder=folder, class_data_root=folder, center_crop=False)
    crops = [patched[0]["class_images"] for _ in range(20)]
    assert any(not torch.equal(crops[0], crop) for crop in crops)
    given = options(f"--instance_data_dir={folder}", "--class_prompt=a dog", "--seed=1")
    (view,) = class_samples(given, [folder / "a.png"])[0].views
    assert torch.equal(view.pixels(IMAGE_SIZE), view.pixels(IMAGE_SIZE))


@pytest.mark.long
def test_the_last_batch_of_an_epoch_is_partial_or_full(tmp_path: Path, tiny_model: Path, dog_dir: Path) -> None:
    """5 images at batch 2 are 2, 2 and 1; the second step of two batches each has but the last."""
    run = train("lora", tmp_path / "out", tiny_model, [f"--instance_data_dir={dog_dir}"], *LORA_RUN)
    assert run.status == 0, run.log
    assert [images for _, images in run.scalars("images")] == [2, 2, 1, 2, 2]
    native = Stream(seed=0, length=5, batch_size=2, accumulation=2, ranks=1)
    assert [len(batch) for batch in native.batches(0, 0, steps=3)] == [2] * 6


@pytest.mark.long
def test_the_loss_is_logged_per_batch_or_per_step(tmp_path: Path, tiny_model: Path, dog_dir: Path) -> None:
    data = [f"--instance_data_dir={dog_dir}"]
    patched = train("lora", tmp_path / "patched", tiny_model, data, *LORA_RUN)
    assert [step for step, _ in patched.scalars("loss")] == [0, 1, 2, 2, 3]
    native = native_runs.run("lora", tmp_path / "native", tiny_model, data, *LORA_RUN)
    assert native.returncode == 0, native.stdout
    assert list(native_runs.losses(tmp_path / "native")) == [1, 2, 3]
