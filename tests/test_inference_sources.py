"""What --model and --lora may name, and what is refused before weights are loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from painting import make_lora
from sd3.common.command_line import UserError
from sd3.common.model_files import MODELS
from sd3.inference.sources import find_sources


@pytest.fixture(scope="module")
def lora(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_lora(tiny_model, tmp_path_factory.mktemp("lora"), text_encoders=True)


def run_of(folder: Path, base: str, *parts: Path) -> Path:
    """A launcher's run directory that holds these parts."""
    folder.mkdir(parents=True)
    (folder / "run_settings.json").write_text(json.dumps({"model_name": base}))
    for part in parts:
        (shutil.copytree if part.is_dir() else shutil.copy)(part, folder / part.name)
    return folder


def refused(model: object, lora: object = "") -> str:
    with pytest.raises(UserError) as error:
        find_sources(str(model), str(lora), local_files_only=True)
    assert error.value.status == 2
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_model_directory(tiny_model: Path) -> None:
    sources = find_sources(str(tiny_model))
    assert set(MODELS) < set(sources.parts)
    assert all(folder.parent == tiny_model and folder.is_dir() for folder in sources.parts.values())
    assert (sources.lora, sources.lora_hash()) == (None, "")
    assert find_sources(str(tiny_model), default_lora="").lora is None


def test_the_output_of_a_full_fine_tune_is_a_model_directory(tiny_model: Path, tmp_path: Path) -> None:
    run = shutil.copytree(tiny_model, tmp_path / "run")
    (run / "run_settings.json").write_text(json.dumps({"model_name": "elsewhere"}))
    (run / "checkpoint-4").mkdir()
    assert find_sources(str(run)).parts["transformer"] == run / "transformer"
    # What a run leaves beside the model does not make it another model.
    assert find_sources(str(run)).model_hash() == find_sources(str(tiny_model)).model_hash()


def test_a_checkpoint_of_a_full_fine_tune_goes_with_the_runs_base(tiny_model: Path, tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", str(tiny_model))
    checkpoint = run / "checkpoint-8"
    shutil.copytree(tiny_model / "transformer", checkpoint / "transformer")
    (checkpoint / "complete").touch()
    parts = find_sources(str(checkpoint)).parts
    assert parts["transformer"] == checkpoint / "transformer"
    assert parts["vae"] == tiny_model / "vae"
    assert f"use --model={checkpoint}" in refused(run)


@pytest.mark.parametrize("inside", ["", "checkpoint-8"])
def test_a_lora_run_stands_for_its_base_with_it(tiny_model: Path, lora: Path, tmp_path: Path, inside: str) -> None:
    run = run_of(tmp_path / "run", str(tiny_model), lora)
    if inside:
        (run / inside).mkdir()
        (run / lora.name).rename(run / inside / lora.name)
    sources = find_sources(str(run / inside))
    assert sources.parts["transformer"] == tiny_model / "transformer"
    assert sources.lora == run / inside / lora.name
    assert find_sources(str(tiny_model), str(run / inside)).lora == sources.lora
    # Its own LoRA comes before a script's default, may be named once more, and is not silently replaced.
    own = run / inside
    assert find_sources(str(own), default_lora=str(lora)).lora == sources.lora
    assert find_sources(str(own), str(own)).lora == sources.lora
    assert "brings its own LoRA" in refused(own, lora)


def test_a_lora_by_file_and_by_directory(tiny_model: Path, lora: Path) -> None:
    by_file, by_folder = (find_sources(str(tiny_model), str(name)) for name in (lora, lora.parent))
    assert by_file.lora == by_folder.lora == lora
    assert len(by_file.lora_hash()) == 64


def test_the_hash_of_a_model_is_that_of_its_content(tiny_model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    before = find_sources(str(tiny_model)).model_hash()
    assert find_sources(str(copy)).model_hash() == before
    weights = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["proj_out.bias"] += 1
    save_file(tensors, weights)
    assert find_sources(str(copy)).model_hash() != before


def test_large_weights_are_sampled_at_both_ends_and_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sd3.common.model_files.BLOCK_BYTES", 4)
    from sd3.common.model_files import content_hash

    file = tmp_path / "part" / "weights.bin"
    file.parent.mkdir()
    content = bytearray(range(200))
    file.write_bytes(content)
    before = content_hash([file.parent])
    for place in (0, 199, 28):  # blocks of a file that is no safetensors file
        changed = bytearray(content)
        changed[place] ^= 1
        file.write_bytes(changed)
        assert content_hash([file.parent]) != before, place


def test_every_tensor_counts_in_the_hash_of_large_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sd3.common.model_files.BLOCK_BYTES", 64)
    monkeypatch.setattr("sd3.common.model_files.SAMPLE_BYTES", 16)
    from sd3.common.model_files import content_hash

    part = tmp_path / "part"
    part.mkdir()
    tensors = {f"t{number}": torch.zeros(100) for number in range(50)} | {"short": torch.zeros(1)}
    save_file(tensors, part / "weights.safetensors")
    hashes = {content_hash([part])}
    for name, tensor in tensors.items():
        save_file({**tensors, name: tensor + 1}, part / "weights.safetensors")
        hashes.add(content_hash([part]))
    assert len(hashes) == 52


def test_models_that_cannot_be_used(tiny_model: Path, tmp_path: Path) -> None:
    assert "is no directory and no hub name" in refused(tmp_path / "none")
    assert "is not in the local cache" in refused("nobody/no-such-model")
    shutil.copytree(tiny_model, tmp_path / "partial")
    shutil.rmtree(tmp_path / "partial" / "text_encoder_3")
    (tmp_path / "partial" / "vae" / "config.json").unlink()
    assert "vae/config.json, text_encoder_3/config.json missing" in refused(tmp_path / "partial")
    shutil.copytree(tiny_model, tmp_path / "wordless")
    (tmp_path / "wordless" / "tokenizer" / "vocab.json").unlink()
    (tmp_path / "wordless" / "tokenizer_3" / "tokenizer.json").unlink()
    assert "tokenizer/vocab.json, tokenizer_3/spiece.model missing" in refused(tmp_path / "wordless")
    cut = run_of(tmp_path / "cut", str(tiny_model), tiny_model / "transformer")
    (weights,) = (cut / "transformer").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-9])
    assert "is cut short; use another checkpoint" in refused(cut)
    assert "let the run finish" in refused(run_of(tmp_path / "unfinished", str(tiny_model)))
    gone = run_of(tmp_path / "orphan", str(tmp_path / "gone"), tiny_model / "transformer")
    assert f"was trained from {tmp_path / 'gone'}, which cannot be used" in refused(gone)
    itself = run_of(tmp_path / "itself", str(tmp_path / "itself"))
    assert "names itself as its base model" in refused(itself)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda tensors: {}, "holds no weights"),
        (lambda tensors: {key: value for key, value in tensors.items() if "lora_A" in key}, "half of transformer.tr"),
        (lambda tensors: {key: value.flatten() for key, value in tensors.items()}, "is not a matrix"),
        (lambda tensors: {"lora_unet_down.alpha": torch.ones(1)}, "is not a LoRA of SD3 in diffusers' format"),
        (lambda tensors: {"unet.a.lora_A.weight": torch.ones(4, 4)}, "is not a LoRA of SD3 in diffusers' format"),
        (lambda tensors: {f"{key}x": value for key, value in tensors.items()}, "is not a LoRA of SD3"),
        (
            lambda tensors: {key.replace("blocks.0", "blocks.37"): value for key, value in tensors.items()},
            "transformer has no transformer_blocks.37.attn",
        ),
        (
            lambda tensors: {key: value.repeat(2, 2) for key, value in tensors.items()},
            "was trained for another model: ",
        ),
        (
            lambda tensors: {key: value[:2] if "lora_A" in key else value for key, value in tensors.items()},
            "differ in rank",
        ),
    ],
    ids=["empty", "half", "flat", "kohya", "unet", "no pair", "more blocks", "wider", "ranks"],
)
def test_loras_that_cannot_be_used(tiny_model: Path, lora: Path, tmp_path: Path, spoil, said: str) -> None:
    tensors = {key: value for key, value in load_file(lora).items() if key.startswith("transformer.")}
    save_file({key: value.contiguous() for key, value in spoil(tensors).items()}, tmp_path / "spoilt.safetensors")
    assert said in refused(tiny_model, tmp_path / "spoilt.safetensors")


def test_a_lora_that_is_not_there_or_is_no_safetensors_file(tiny_model: Path, tmp_path: Path) -> None:
    assert "does not exist" in refused(tiny_model, tmp_path / "none.safetensors")
    assert "holds no pytorch_lora_weights.safetensors" in refused(tiny_model, tmp_path)
    (tmp_path / "text.safetensors").write_text("hello")
    assert "has no safetensors header" in refused(tiny_model, tmp_path / "text.safetensors")
