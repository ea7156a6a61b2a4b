"""Class images on several ranks: the symptom without each patch, and none with all."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from patching import Run, train

pytestmark = [pytest.mark.upstream, pytest.mark.long]


@pytest.fixture(autouse=True)
def _checkout(upstream_checkout: Path) -> None:
    """Every test here needs it."""


@pytest.fixture
def generate(tmp_path: Path, tiny_model: Path, dog_dir: Path):
    """A run of one step that fills `class` up to so many images."""

    def run(number: int, name: str = "out", kind: str = "lora", **options: object) -> Run:
        arguments = ("--with_prior_preservation", "--class_prompt=a photo of dog", "--sample_batch_size=1", "--seed=0")
        arguments = (*arguments, f"--class_data_dir={tmp_path / 'class'}", f"--num_class_images={number}")
        data = [f"--instance_data_dir={dog_dir}"]
        done = train(kind, tmp_path / name, tiny_model, data, *arguments, "--max_train_steps=1", **options)
        assert done.status == 0, done.log
        return done

    return run


def distinct(folder: Path) -> int:
    return len({hashlib.sha256(file.read_bytes()).digest() for file in folder.iterdir()})


@pytest.mark.parametrize(("kind", "without"), [("lora", "0025"), ("lora", None), ("full", None)])
def test_0025_each_rank_generates_its_own(tmp_path: Path, generate, kind: str, without: str | None) -> None:
    generate(6, kind=kind, ranks=2, without=without)
    assert len(list((tmp_path / "class").iterdir())) == 6
    assert distinct(tmp_path / "class") == (3 if without else 6)


@pytest.mark.parametrize("without", ["0025", None])
def test_0025_images_added_later_are_new(tmp_path: Path, generate, without: str | None) -> None:
    generate(2, "first", without=without)
    generate(4, "second", without=without)
    assert distinct(tmp_path / "class") == (2 if without else 4)


def test_0025_one_process_generates_what_it_did(tmp_path: Path, generate) -> None:
    generate(2, "with")
    images = {file.name: file.read_bytes() for file in (tmp_path / "class").iterdir()}
    for file in (tmp_path / "class").iterdir():
        file.unlink()
    generate(2, "without", without="0025")
    assert {file.name: file.read_bytes() for file in (tmp_path / "class").iterdir()} == images


@pytest.mark.parametrize("without", ["0026", None])
def test_0026_a_late_rank_makes_its_share(tmp_path: Path, generate, without: str | None) -> None:
    generate(6, ranks=2, without=without, environment={"SPY_LATE": "1:45"})
    assert (len(list((tmp_path / "class").iterdir())) == 6) == (without is None)
