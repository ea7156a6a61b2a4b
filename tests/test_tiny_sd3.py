"""The tiny SD3 is a whole SD3: it loads, paints, and is the same for the same seed."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from sd3.common.tiny_sd3 import main, make_tiny_sd3


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_it_loads_as_the_published_pipeline_and_paints(tiny_model: Path) -> None:
    import torch
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(str(tiny_model), local_files_only=True)
    assert all(part is not None for part in pipeline.components.values() if part is not pipeline.image_encoder)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    image = pipeline("a dog", height=64, width=64, num_inference_steps=2, generator=generator).images[0]
    assert image.size == (64, 64)


def test_tokenizers_read_any_text(tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        tokenizer = AutoTokenizer.from_pretrained(str(tiny_model / name), local_files_only=True)
        ids = tokenizer("a photo of sks dog, 狗 é!", padding="max_length", max_length=77, truncation=True).input_ids
        assert len(ids) == 77
        assert tokenizer("a dog").input_ids != tokenizer("a cat").input_ids


def test_the_seed_alone_decides(tiny_model: Path, tmp_path: Path) -> None:
    import torch

    before = torch.get_rng_state()
    make_tiny_sd3(tmp_path / "same", seed=0)
    make_tiny_sd3(tmp_path / "other", seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    same, other, first = digests(tmp_path / "same"), digests(tmp_path / "other"), digests(tiny_model)
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert same == first
    assert other.keys() == first.keys()
    assert other[weights] != first[weights]


def test_what_is_there_stays_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "not an empty directory" in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
