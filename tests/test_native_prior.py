"""Class pictures: how many, by whom, and the same pixels however often the painting was cut short."""

from __future__ import annotations

import argparse
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image

from native_parts import Ranks, options
from sd3.common.command_line import UserError
from sd3.native.prior import class_pictures, make_class_images

COUNT, BATCH = 5, 2
plain_call = StableDiffusion3Pipeline.__call__


def quick_call(self: StableDiffusion3Pipeline, prompt: list[str], **settings: object) -> object:
    """Paints small pictures in two steps."""
    assert set(prompt) == {"a dog in general"}
    return plain_call(self, prompt, num_inference_steps=2, height=32, width=32, **settings)


@pytest.fixture(autouse=True)
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches painted."""
    sizes: list[int] = []

    def call(self: StableDiffusion3Pipeline, prompt: list[str], **settings: object) -> object:
        sizes.append(len(prompt))
        return quick_call(self, prompt, **settings)

    monkeypatch.setattr(StableDiffusion3Pipeline, "__call__", call)
    return sizes


@pytest.fixture(scope="module")
def make(tiny_model: Path) -> Callable[..., dict[str, bytes]]:
    """Fills a folder; returns the bytes of what lies there."""

    def made(folder: Path, *flags: str, ranks: Ranks | None = None) -> dict[str, bytes]:
        make_class_images(given(folder, *flags), tiny_model, ranks or Ranks())
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    return made


@pytest.fixture(scope="module")
def whole(make: Callable, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run leaves that nothing disturbs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StableDiffusion3Pipeline, "__call__", quick_call)
        return make(tmp_path_factory.mktemp("whole"))


def given(folder: Path, *flags: str) -> argparse.Namespace:
    prior = ("--with_prior_preservation", f"--class_data_dir={folder}", "--class_prompt=a dog in general")
    return options(*prior, f"--num_class_images={COUNT}", f"--sample_batch_size={BATCH}", "--seed=3", *flags)


def test_as_many_as_asked_for_and_no_two_alike(tmp_path: Path, make: Callable, batches: list[int]) -> None:
    whole = make(tmp_path / "new" / "folder")
    assert sorted(whole) == [f"class-{number:05}.png" for number in range(COUNT)]
    assert len(set(whole.values())) == COUNT
    assert batches == [2, 2, 1]
    assert class_pictures(given(tmp_path / "new" / "folder", "--num_class_images=3"))[-1].name == "class-00002.png"


@pytest.mark.parametrize("killed_at", [1, 2, 4])
def test_the_rest_has_the_pixels_of_an_uncut_run(
    killed_at: int, tmp_path: Path, make: Callable, whole: dict[str, bytes], batches: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    save, saved = Image.Image.save, []

    def dying(self: Image.Image, *settings: object, **more: object) -> None:
        save(self, *settings, **more)
        saved.append(1)
        if len(saved) > killed_at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Image.Image, "save", dying)
        make(tmp_path / "cut")
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut").iterdir()}
    assert len(kept) == killed_at
    assert make(tmp_path / "cut") == whole
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    painted = len(batches)
    assert make(tmp_path / "cut") == whole and len(batches) == painted


def test_ranks_share_the_work(tmp_path: Path, make: Callable, whole: dict[str, bytes], batches: list[int]) -> None:
    ranks = [Ranks(index, 2) for index in range(2)]
    first = make(tmp_path / "shared", "--num_class_images=4", ranks=ranks[0])
    assert sorted(first) == ["class-00000.png", "class-00001.png"]
    for path in (tmp_path / "shared").iterdir():
        path.rename(tmp_path / path.name)  # the second rank looked before the first had painted
    second = make(tmp_path / "shared", "--num_class_images=4", ranks=ranks[1])
    assert first | second == {name: content for name, content in whole.items() if name != "class-00004.png"}
    assert batches == [2, 2] and [rank.arrivals for rank in ranks] == [2, 2]


def test_another_seed_paints_others(tmp_path: Path, make: Callable, whole: dict[str, bytes]) -> None:
    assert not set(make(tmp_path, "--num_class_images=2", "--seed=4").values()) & set(whole.values())


def test_foreign_pictures_count(tmp_path: Path, make: Callable, batches: list[int]) -> None:
    for name in ("a.jpg", "b.PNG", ".half.png", "notes.txt"):
        Image.new("RGB", (8, 8)).save(tmp_path / name, format="PNG")
    made = make(tmp_path)
    assert sorted(name for name in made if name.startswith("class")) == [
        f"class-0000{number}.png" for number in range(3)
    ]
    names = [path.name for path in class_pictures(given(tmp_path))]
    assert names == ["a.jpg", "b.PNG", "class-00000.png", "class-00001.png", "class-00002.png"]
    batches.clear()
    make(tmp_path, "--num_class_images=2")
    assert not batches


@pytest.mark.parametrize(
    ("device", "flags", "dtype"),
    [
        ("cpu", (), torch.float32),
        ("cpu", ("--prior_generation_precision=bf16",), torch.bfloat16),
        ("cuda", (), torch.float16),
        ("npu", ("--prior_generation_precision=no",), torch.float16),
        ("cuda", ("--prior_generation_precision=fp32",), torch.float32),
    ],
)
def test_the_precision(
    device: str, flags: tuple[str, ...], dtype: torch.dtype,
    tmp_path: Path, make: Callable, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    asked = {}

    def from_pretrained(model: Path, **settings: object) -> StableDiffusion3Pipeline:
        asked.update(settings)
        raise RuntimeError("CUDA out of memory.")

    monkeypatch.setattr(StableDiffusion3Pipeline, "from_pretrained", from_pretrained)
    ranks = Ranks()
    ranks.device = types.SimpleNamespace(type=device)
    with pytest.raises(UserError, match="lower --sample_batch_size=2"):
        make(tmp_path, "--revision=r", "--variant=v", *flags, ranks=ranks)
    assert asked == {"revision": "r", "variant": "v", "torch_dtype": dtype}


def test_a_directory_that_cannot_be_made(tmp_path: Path, make: Callable) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--class_data_dir="):
        make(tmp_path / "file")
