"""Latents and embeds computed before a run: right, found again, never stale, and whole whatever happened before."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import pickle
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file

from native_parts import Ranks, noise_pictures, options, view, with_changed, with_variant
from sd3.common.command_line import UserError
from sd3.native import cache as cache_module
from sd3.native import precompute as precompute_module
from sd3.native.cache import LEFTOVER_AGE, Cache, compute_missing
from sd3.native.pictures import View
from sd3.native.precompute import Precompute
from sd3.native.text import ENCODERS, TextEncoders

CAPTIONS = [f"a dog with {number} legs" for number in range(10)]


def given(folder: Path, *flags: str) -> argparse.Namespace:
    return options(f"--precompute_dir={folder}", "--resolution=32", *flags)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return noise_pictures(tmp_path_factory.mktemp("pictures"))


def fill(folder: Path, model: Path, files: Sequence[Path], ranks: Ranks | None = None) -> list[str]:
    """Have everything computed; the keys."""
    precompute = Precompute(given(folder), model, ranks or Ranks())
    keys = precompute.latents([view(file) for file in files])
    return keys + precompute.prompts(CAPTIONS, torch.float32, 77)


def entries(folder: Path) -> dict[str, bytes]:
    """The entries' bytes by key."""
    return {file.stem: file.read_bytes() for file in folder.glob("*/[!.]*.safetensors")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, files: list[Path]) -> tuple[Path, list[str]]:
    """A cache that was filled without disturbance, and its keys: ten latents, then ten embeds."""
    folder = tmp_path_factory.mktemp("whole")
    keys = fill(folder, tiny_model, files)
    assert sorted(entries(folder)) == sorted(keys) and len(set(keys)) == 20
    return folder, keys


@pytest.fixture
def spoilt(whole: tuple[Path, list[str]], tmp_path: Path) -> tuple[Path, list[str]]:
    """The same, to be spoilt."""
    return Path(shutil.copytree(whole[0], tmp_path / "copy")), whole[1]


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The parts that are loaded."""
    found: list[str] = []

    def noted(name: str, load: Callable) -> Callable:
        def run(*arguments: Any, **keywords: Any) -> Any:
            found.append(name)
            return load(*arguments, **keywords)

        return run

    monkeypatch.setattr(AutoencoderKL, "from_pretrained", noted("vae", AutoencoderKL.from_pretrained))
    monkeypatch.setattr(precompute_module, "load_encoders", noted("encoders", precompute_module.load_encoders))
    return found


# ---- right


@pytest.mark.parametrize(("crop", "flip"), [(None, False), (None, True), ((0.0, 0.9), False)])
def test_entries_are_the_vaes_distribution(
    crop: tuple[float, float] | None, flip: bool, files: list[Path], tiny_model: Path, tmp_path: Path
) -> None:
    views = [view(file, crop, flip) for file in files[:6]]
    precompute = Precompute(given(tmp_path), tiny_model, Ranks())
    found = [precompute.cache.read(key) for key in precompute.latents(views)]
    vae = AutoencoderKL.from_pretrained(tiny_model / "vae")
    for one, picture in zip(found, views, strict=True):
        with torch.no_grad():
            expected = vae.encode(picture.pixels(32)[None]).latent_dist
        for name in ("mean", "logvar"):
            assert (one[name].shape, one[name].dtype) == ((16, 4, 4), torch.float32)
            torch.testing.assert_close(one[name], getattr(expected, name)[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[0]["mean"], found[1]["mean"], rtol=1e-2)


@pytest.mark.parametrize(("dtype", "length"), [(torch.float32, 77), (torch.bfloat16, 20)])
def test_entries_are_the_pipelines_embeds(dtype: torch.dtype, length: int, tiny_model: Path, tmp_path: Path) -> None:
    texts = ["a dog", "", "on two lines\nand with more letters than the twenty that T5 may be given"]
    precompute = Precompute(given(tmp_path), tiny_model, Ranks())
    found = [precompute.cache.read(key) for key in precompute.prompts(texts, dtype, length)]
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_model, transformer=None, vae=None, torch_dtype=dtype)
    with torch.no_grad():
        prompt, _, pooled, _ = pipeline.encode_prompt(
            texts, texts, texts, do_classifier_free_guidance=False, max_sequence_length=length
        )
    assert prompt.shape[1] == 77 + length
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for row, one in enumerate(found):
        assert one["prompt"].dtype == one["pooled"].dtype == dtype
        torch.testing.assert_close(one["prompt"], prompt[row], **tolerance)
        torch.testing.assert_close(one["pooled"], pooled[row], **tolerance)


def test_a_picture_that_is_repeated_is_encoded_once(files: list[Path], tiny_model: Path, tmp_path: Path) -> None:
    precompute = Precompute(given(tmp_path), tiny_model, Ranks())
    keys = precompute.latents([view(files[0]), view(files[1]), view(files[0])])
    assert keys[0] == keys[2] != keys[1]
    assert len(entries(tmp_path)) == 2


# ---- never stale


def latent_key(folder: Path, model: Path, one: View, *flags: str) -> str:
    return Precompute(given(folder, *flags), model, Ranks()).latents([one])[0]


@pytest.mark.parametrize(
    "what", ["bytes", "crop", "place", "flip", "resolution", "weights", "variant", "precision", "name"]
)
def test_latents_have_a_key_of_their_own(what: str, files: list[Path], tiny_model: Path, tmp_path: Path) -> None:
    file = Path(shutil.copy(files[0], tmp_path / "a.png"))
    one, model, flags = view(file), tiny_model, ()
    key = latent_key(tmp_path / "cache", model, one)
    if what == "bytes":  # the same pixels, but who is to know
        file.write_bytes(file.read_bytes() + b" ")
    elif what in ("crop", "place"):
        key = latent_key(tmp_path / "cache", model, view(file, (0.5, 0.1))) if what == "place" else key
        one = view(file, (0.5, 0.5))
    elif what == "flip":
        one = view(file, flip=True)
    elif what == "resolution":
        flags = ("--resolution=48",)
    elif what == "weights":
        model = with_changed(tiny_model, "vae", tmp_path)
    elif what == "variant":
        model, flags = with_variant(tiny_model, tmp_path), ("--variant=fp16",)
        key = latent_key(tmp_path / "cache", model, one)
    elif what == "precision":
        flags = ("--vae_precision=bf16",)
    else:
        one = view(file.rename(tmp_path / "b.png"))
    assert (latent_key(tmp_path / "cache", model, one, *flags) == key) == (what == "name")


@pytest.mark.parametrize("what", ["nothing", "caption", "dtype", "length", *ENCODERS])
def test_embeds_have_a_key_of_their_own(what: str, tiny_model: Path, tmp_path: Path) -> None:
    def key(model: Path, caption: str = "a dog", dtype: torch.dtype = torch.float32, length: int = 77) -> str:
        return Precompute(given(tmp_path / "cache"), model, Ranks()).prompts([caption], dtype, length)[0]

    before = key(tiny_model)
    changes = {"caption": "a dog ", "dtype": torch.bfloat16, "length": 20}
    model = with_changed(tiny_model, what, tmp_path) if what in ENCODERS else tiny_model
    assert (key(model, **({what: changes[what]} if what in changes else {})) == before) == (what == "nothing")


# ---- found again


def test_a_second_run_loads_and_computes_nothing(
    spoilt: tuple[Path, list[str]], files: list[Path], tiny_model: Path, loads: list[str]
) -> None:
    folder, keys = spoilt
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    assert fill(folder, tiny_model, files) == keys
    assert loads == []
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before
    fill(folder / "new", tiny_model, files)
    assert loads == ["vae", "encoders"]


def test_only_what_is_missing_is_loaded_for(
    spoilt: tuple[Path, list[str]], files: list[Path], tiny_model: Path, loads: list[str]
) -> None:
    folder, keys = spoilt
    Cache(folder).file(keys[-1]).unlink()
    fill(folder, tiny_model, files)
    assert loads == ["encoders"]


# ---- whole


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable, tuple[Path]]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("what", ["pickle", "torch", "cut short", "nothing", "header"])
def test_what_is_no_entry_is_not_executed_and_computed_again(
    what: str, spoilt: tuple[Path, list[str]], whole: tuple[Path, list[str]], files: list[Path], tiny_model: Path,
    tmp_path: Path, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    folder, keys = spoilt
    for key in (keys[0], keys[-1]):
        file = Cache(folder).file(key)
        if what == "torch":
            torch.save({"mean": Bomb(tmp_path / "mark")}, file)
        else:
            good = file.read_bytes()
            crafted = {"pickle": pickle.dumps(Bomb(tmp_path / "mark")), "cut short": good[:-7], "nothing": b""}
            file.write_bytes(crafted.get(what, b"\xff" * 8 + good[8:]))
    fill(folder, tiny_model, files)
    assert not (tmp_path / "mark").exists()
    assert caplog.text.count("is damaged") == 2
    assert entries(folder) == entries(whole[0])
    if what == "pickle":
        pickle.loads(pickle.dumps(Bomb(tmp_path / "mark")))
        assert (tmp_path / "mark").exists()  # it would have shown


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (lambda mean: {"mean": mean}, "it holds mean, expected mean, logvar"),
        (lambda mean: {"mean": mean[:, :2], "logvar": mean}, "mean has shape"),
        (lambda mean: {"mean": mean / 0, "logvar": mean}, "mean is not finite"),
    ],
)
def test_an_entry_of_other_tensors_is_computed_again(
    spoilt: tuple[Path, list[str]], whole: tuple[Path, list[str]], tiny_model: Path, files: list[Path],
    caplog: pytest.LogCaptureFixture, fault: Callable[[torch.Tensor], dict], says: str,
) -> None:  # fmt: skip
    """It is a safetensors file, and not what a run of this resolution can be trained on."""
    folder, keys = spoilt
    file = Cache(folder).file(keys[0])
    save_file({name: value.contiguous() for name, value in fault(load_file(file)["mean"]).items()}, file)
    fill(folder, tiny_model, files)
    assert says in caplog.text
    assert entries(folder) == entries(whole[0])


class Interrupted(BaseException):
    """As a signal's handler raises."""


@pytest.mark.parametrize("at", [0, 1, 5, 11, 17])
def test_an_interrupted_fill_ends_with_the_same_bytes(
    at: int, whole: tuple[Path, list[str]], files: list[Path], tiny_model: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    plain, seen = cache_module.save_file, iter(range(100))

    def save(tensors: dict[str, torch.Tensor], file: Path) -> None:
        plain(tensors, file)
        if next(seen) == at:
            file.write_bytes(file.read_bytes()[:50])
            raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "save_file", save)
        with pytest.raises(Interrupted):
            fill(tmp_path, tiny_model, files)
    assert len(entries(tmp_path)) == at
    assert not list(tmp_path.glob("*/.*"))
    fill(tmp_path, tiny_model, files)
    assert entries(tmp_path) == entries(whole[0])


def test_a_chunk_with_something_missing_is_computed_whole(tmp_path: Path) -> None:
    """What else is in a batch can show in the last bits, so that a part of it would not be what the whole had been."""
    cache, calls = Cache(tmp_path), []
    for number in (0, 2, 3, 4, 5):
        cache.write(f"key{number}", {"number": torch.tensor(-1)})

    def compute(places: list[int]) -> list[dict[str, torch.Tensor]]:
        calls.append(places)
        return [{"number": torch.tensor(place)} for place in places]

    keys = [f"key{number}" for number in range(7)]
    assert compute_missing(cache, keys, {"number": ()}, compute, 3, lambda _: True, lambda _: None) == 2
    assert calls == [[0, 1, 2], [6]]
    assert [cache.read(key)["number"].item() for key in keys] == [-1, 1, -1, -1, -1, -1, 6]


def forked(work: Callable[[], Any]) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def test_a_kill_leaves_no_entry_and_its_leftovers_go_when_they_are_old(
    whole: tuple[Path, list[str]], files: list[Path], tiny_model: Path, tmp_path: Path
) -> None:
    def work() -> None:
        plain = cache_module.save_file

        def save(tensors: dict[str, torch.Tensor], file: Path) -> None:
            plain(tensors, file)
            if len(entries(tmp_path)) == 6:
                os.kill(os.getpid(), signal.SIGKILL)

        cache_module.save_file = save
        torch.set_num_threads(1)
        fill(tmp_path, tiny_model, files)

    process = forked(work)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert len(entries(tmp_path)) == 6
    (leftover,) = tmp_path.glob("*/.*.safetensors")
    fill(tmp_path, tiny_model, files)
    assert entries(tmp_path) == entries(whole[0])
    assert leftover.exists()  # it might be another run's at work
    old = time.time() - LEFTOVER_AGE - 60
    os.utime(leftover, (old, old))
    Precompute(given(tmp_path), tiny_model, Ranks(1, 2))
    assert leftover.exists()  # one rank sweeps for all
    Precompute(given(tmp_path), tiny_model, Ranks())
    assert not leftover.exists()


def test_two_runs_fill_one_cache_together(
    whole: tuple[Path, list[str]], files: list[Path], tiny_model: Path, tmp_path: Path
) -> None:
    both = multiprocessing.get_context("fork").Barrier(2)
    computed = multiprocessing.get_context("fork").Value("i", 0)

    def work() -> None:
        plain = cache_module.save_file

        def save(tensors: dict[str, torch.Tensor], file: Path) -> None:
            both.wait(60)  # both are writing the same entry at the same time
            plain(tensors, file)
            with computed.get_lock():
                computed.value += 1

        cache_module.save_file = save
        torch.set_num_threads(1)
        fill(tmp_path, tiny_model, files[:4])

    processes = [forked(work) for _ in range(2)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    keys = whole[1][:4] + whole[1][10:]
    assert computed.value == 2 * len(keys)
    assert entries(tmp_path) == {key: entries(whole[0])[key] for key in keys}


def test_ranks_share_what_is_missing(
    whole: tuple[Path, list[str]], files: list[Path], tiny_model: Path, tmp_path: Path
) -> None:
    """Four pictures and eight captions are a share; rank 1 comes first, so that it cannot rely on rank 0's."""
    keys = whole[1]
    second, first = Ranks(1, 2), Ranks(0, 2)
    assert fill(tmp_path, tiny_model, files, second) == keys
    assert sorted(entries(tmp_path)) == sorted([*keys[4:8], *keys[18:]])
    written = {key: Cache(tmp_path).file(key).stat().st_mtime_ns for key in entries(tmp_path)}
    assert fill(tmp_path, tiny_model, files, first) == keys
    assert entries(tmp_path) == entries(whole[0])
    assert {key: Cache(tmp_path).file(key).stat().st_mtime_ns for key in written} == written
    assert (first.arrivals, second.arrivals) == (2, 2)


def test_a_directory_that_cannot_be_written_is_named(files: list[Path], tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"--precompute_dir={tmp_path / 'file'} cannot be written"):
        fill(tmp_path / "file", tiny_model, files)


def test_encoders_are_one_module_in_the_order_of_the_pipeline(tiny_model: Path) -> None:
    encoders = precompute_module.load_encoders(tiny_model, None, torch.float32)
    assert isinstance(encoders, TextEncoders) and [name for name, _ in encoders.named_children()] == list(ENCODERS)
    assert not any(encoder.training for encoder in encoders.children()) and not any(
        parameter.requires_grad for parameter in encoders.parameters()
    )


@pytest.mark.parametrize(
    ("device", "expected"),
    [("npu", torch.preserve_format), ("cuda", torch.channels_last), ("cpu", torch.channels_last)],
)
def test_channels_last_only_where_the_device_accepts_it(device: str, expected: torch.memory_format) -> None:
    assert precompute_module.convolution_format(device) == expected


@pytest.mark.parametrize("library", ["torch", "pillow", "diffusers", "transformers", "tokenizers"])
def test_entries_of_other_library_versions_are_not_used(
    tmp_path: Path, tiny_model: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    before = set(fill(tmp_path, tiny_model, files[:1]))
    found = precompute_module.package_versions
    monkeypatch.setattr(
        precompute_module, "package_versions",
        lambda names: {name: "0" if name == library else known for name, known in found(names).items()},
    )  # fmt: skip
    after = set(fill(tmp_path, tiny_model, files[:1]))
    of_latents = library in precompute_module.LATENT_LIBRARIES
    of_prompts = library in precompute_module.PROMPT_LIBRARIES
    assert len(after - before) == of_latents * 1 + of_prompts * len(CAPTIONS)
