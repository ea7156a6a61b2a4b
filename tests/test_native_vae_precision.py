"""The precision in which pictures are encoded: half where it does not show, and the same choice in every run.

With the taught VAE: a random one's error in half precision (1.7e-3 to 2.0e-3, by the CPU) is as large as the limit.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from native_parts import Ranks, noise_pictures, options, view
from sd3.common.command_line import UserError
from sd3.native import precompute as precompute_module
from sd3.native.precompute import NEGLIGIBLE, Precompute, encode, error_in_half, half_if_negligible
from sd3.tiny_world.measure import MODEL


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return noise_pictures(tmp_path)


@pytest.fixture
def vae() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(MODEL / "vae", torch_dtype=torch.float32).requires_grad_(False)


@pytest.fixture
def pixels(files: list[Path]) -> torch.Tensor:
    return torch.stack([view(file).pixels(32) for file in files[:4]])


def overflowing(vae: AutoencoderKL) -> AutoencoderKL:
    """Its activations are beyond float16 between two layers, as those of some published VAEs are."""
    vae.encoder.conv_in.weight *= 3e5
    vae.encoder.conv_in.bias *= 3e5
    return vae


def test_half_precision_is_taken_where_it_does_not_show(vae: AutoencoderKL, pixels: torch.Tensor) -> None:
    assert half_if_negligible(error_in_half(vae, pixels).item()) == torch.float16
    assert vae.dtype == torch.float32
    exact = encode(vae, pixels)[0]
    error = (encode(vae.half(), pixels)[0] - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 0 < error <= NEGLIGIBLE


def test_half_precision_is_not_taken_where_it_overflows(vae: AutoencoderKL, pixels: torch.Tensor) -> None:
    assert half_if_negligible(error_in_half(overflowing(vae), pixels).item()) == torch.float32
    assert encode(vae, pixels)[0].isfinite().all()


def test_half_precision_is_not_taken_where_it_rounds_too_much(vae: AutoencoderKL, pixels: torch.Tensor) -> None:
    vae.encoder.conv_in.weight *= 1e-6  # of numbers as small as that float16 keeps few bits
    vae.encoder.conv_in.bias *= 1e-6
    exact, half = encode(vae, pixels)[0], encode(copy.deepcopy(vae).half(), pixels)[0]
    assert half.isfinite().all() and not torch.allclose(half, exact, rtol=1e-2)
    assert half_if_negligible(error_in_half(vae, pixels).item()) == torch.float32


class OnAccelerator(Precompute):
    """As on a device where half precision is faster; it computes on the CPU all the same."""

    spoil: Callable[[AutoencoderKL], AutoencoderKL] = staticmethod(lambda vae: vae)
    loaded: list[torch.dtype]

    def _load_vae(self, dtype: torch.dtype) -> AutoencoderKL:
        self.loaded.append(dtype)
        vae = AutoencoderKL.from_pretrained(self.model / "vae", torch_dtype=torch.float32).requires_grad_(False)
        return self.spoil(vae).to(dtype)


@pytest.fixture
def on_accelerator(tmp_path: Path) -> Iterator[OnAccelerator]:
    ranks = Ranks()
    ranks.device = types.SimpleNamespace(type="cuda")
    made = OnAccelerator(options(f"--precompute_dir={tmp_path / 'cache'}", "--resolution=32"), MODEL, ranks)
    made.loaded = []
    yield made


@pytest.mark.parametrize(("spoil", "dtype"), [(lambda vae: vae, torch.float16), (overflowing, torch.float32)])
def test_auto_finds_its_own_choice_again(
    spoil: Callable, dtype: torch.dtype, on_accelerator: OnAccelerator, files: list[Path]
) -> None:
    on_accelerator.spoil = spoil
    views = [view(file) for file in files]
    keys = on_accelerator.latents(views)
    assert on_accelerator.loaded == [torch.float32, dtype]
    assert all(on_accelerator.cache.read(key)["mean"].isfinite().all() for key in keys)
    assert on_accelerator.latents(views) == keys
    assert on_accelerator.loaded == [torch.float32, dtype]


def test_the_main_rank_chooses_for_all(
    on_accelerator: OnAccelerator, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def answered(values: list[object]) -> list[object]:
        asked.extend(values)
        return [torch.float16]

    monkeypatch.setattr(precompute_module, "broadcast_object_list", answered)
    on_accelerator.accelerator.is_main_process, on_accelerator.accelerator.num_processes = False, 2
    on_accelerator.latents([view(file) for file in files])
    assert asked == [None] and on_accelerator.loaded == [torch.float16]  # for its share alone


@pytest.mark.parametrize("asked", ["fp32", "fp16", "bf16"])
def test_a_precision_that_was_asked_for_is_taken(asked: str, on_accelerator: OnAccelerator, files: list[Path]) -> None:
    on_accelerator.options.vae_precision = asked
    on_accelerator.latents([view(files[0])])
    assert on_accelerator.loaded == [precompute_module.VAE_DTYPES[asked]]


def test_what_was_encoded_because_it_was_asked_for_is_no_choice(
    on_accelerator: OnAccelerator, files: list[Path]
) -> None:
    """An overflow would be found by whoever tries; latents that are there prove nothing."""
    views = [view(file) for file in files]
    on_accelerator.options.vae_precision = "fp16"
    on_accelerator.latents(views)
    on_accelerator.options.vae_precision = "auto"
    on_accelerator.loaded.clear()
    on_accelerator.spoil = overflowing
    on_accelerator.latents(views)
    assert on_accelerator.loaded == [torch.float32, torch.float32]


def test_a_picture_that_overflows_is_named_and_not_kept(on_accelerator: OnAccelerator, files: list[Path]) -> None:
    on_accelerator.options.vae_precision = "fp16"
    on_accelerator.spoil = overflowing
    with pytest.raises(UserError, match=f"in float16 makes no numbers of {files[0].name}; give --vae_precision=fp32"):
        on_accelerator.latents([view(files[0])])
    assert not list(on_accelerator.cache.folder.rglob("*.safetensors"))
