"""Models whose files are there and do not fit together: named before the run, never trained on at random weights."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModelWithProjection

from sd3.common.command_line import UserError
from sd3.common.model_files import check_model, largest_side
from sd3.common.part_loading import load_scheduler, load_tokenizer, load_weights
from sd3.data.caption_lengths import caption_lengths
from sd3.inference.sources import find_sources
from sd3.native.text import TOKENIZERS

PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, free to be changed."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def only_problem(model: Path) -> str:
    (problem,) = check_model(str(model))
    assert "\n" not in problem
    with pytest.raises(UserError, match="damaged|expected"):
        find_sources(str(model))
    return problem


@pytest.mark.parametrize("entry", [5, True, "x", {"a": 1}, {}, [], ["transformers"], [5, 6], [None, "x"]], ids=str)
def test_an_index_with_the_wrong_kind_of_entry_is_damaged(model: Path, entry: object) -> None:
    change(model / "model_index.json", text_encoder_3=entry)
    assert f"model_index.json has {entry!r} for text_encoder_3, expected the names of a" in only_problem(model)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"a": '], ids=repr)
@pytest.mark.parametrize(
    "name",
    ["model_index.json", "transformer/config.json", "text_encoder_3/config.json", "scheduler/scheduler_config.json",
     "tokenizer/vocab.json", "tokenizer_2/tokenizer_config.json", "tokenizer_3/tokenizer.json"],
)  # fmt: skip
def test_a_file_that_is_no_json_object_is_named(model: Path, name: str, content: bytes) -> None:
    (model / name).write_bytes(content)
    assert f"is damaged: {name} is not" in only_problem(model)


def test_an_index_that_is_a_named_pipe_or_a_folder_is_not_waited_for(model: Path) -> None:
    index = model / "model_index.json"
    index.unlink()
    os.mkfifo(index)
    assert "model_index.json is not a file" in only_problem(model)
    index.unlink()
    index.mkdir()
    assert "model_index.json is not a file" in check_model(str(model))[0]


@pytest.mark.parametrize("offsets", [["a", 0], [0], [4, 0], [-8, 0], [0.0, 0], None], ids=str)
def test_a_header_whose_places_are_no_places_is_damaged(model: Path, offsets: object) -> None:
    entry = {"dtype": "F32", "shape": [], "data_offsets": offsets}
    header = json.dumps({"transformer_blocks.0.a": entry}).encode()
    (weights,) = (model / "transformer").glob("*.safetensors")
    weights.write_bytes(len(header).to_bytes(8, "little") + header)
    assert f"transformer/{weights.name} has no safetensors header" in only_problem(model)


def test_an_index_names_every_part(model: Path) -> None:
    file = model / "model_index.json"
    file.write_text(json.dumps({key: value for key, value in json.loads(file.read_text()).items() if key != "vae"}))
    (problem,) = check_model(str(model))
    assert "is incomplete: vae (not in model_index.json) missing" in problem


@pytest.mark.parametrize("name", ["tokenizer/vocab.json", "tokenizer_3/tokenizer.json"])
def test_a_vocabulary_of_the_wrong_kind_is_named_where_captions_are_counted(model: Path, name: str) -> None:
    (model / name).write_text('{"a": [1, {"b": 2}]}')
    folder = (model / name).parent
    with pytest.raises(UserError, match=f"{folder} cannot be loaded .*; download it again"):
        caption_lengths(["word " * 200], model, 77)
    with pytest.raises(UserError, match=f"{folder} cannot be loaded .*; download it again"):
        load_tokenizer(TOKENIZERS[folder.name], folder)("word")


@pytest.mark.parametrize("kind", ["FluxPipeline", "StableDiffusionXLPipeline"])
def test_a_pipeline_of_another_kind_is_called_so(model: Path, kind: str) -> None:
    change(model / "model_index.json", _class_name=kind)
    shutil.rmtree(model / "text_encoder_3")
    expected = f"is a {kind}, expected a StableDiffusion3Pipeline; give a model of that kind."
    assert check_model(str(model)) == [f"--model_name={model} {expected}"]


@pytest.mark.parametrize("part", PARTS)
def test_weights_of_another_part_are_refused(model: Path, part: str) -> None:
    (weights,) = (model / part).glob("*.safetensors")
    (others,) = (model / ("vae" if part != "vae" else "transformer")).glob("*.safetensors")
    shutil.copy(others, weights)
    assert f"{part} has weights of something else" in only_problem(model)


@pytest.mark.parametrize(
    ("part", "values", "what"),
    [
        ("transformer", {"num_layers": 3}, "num_layers 3, and the weights have 2 blocks"),
        ("transformer", {"num_layers": "2"}, "num_layers '2', and the weights have 2 blocks"),
        ("transformer", {"joint_attention_dim": 7}, "joint_attention_dim 7, and the weights have 96"),
        ("text_encoder", {"hidden_size": 7}, "hidden_size 7, and the weights have 32"),
        ("text_encoder_2", {"num_hidden_layers": 5}, "num_hidden_layers 5, and the weights have 2 blocks"),
        ("text_encoder_3", {"d_model": None}, "d_model None, and the weights have 96"),
        ("vae", {"block_out_channels": "abc"}, "block_out_channels 'abc', and the weights have 4 blocks"),
        ("vae", {"shift_factor": None}, "shift_factor None, expected a number"),
    ],
)
def test_a_configuration_of_another_model_is_refused(model: Path, part: str, values: dict, what: str) -> None:
    change(model / part / "config.json", **values)
    assert f"{part}/config.json has {what}" in only_problem(model)


def test_merges_that_are_cut_short_are_refused(tiny_model: Path) -> None:
    # The tests' tokenizers have no merges; the tiny world's have.
    from sd3.common.tokenizer_files import damaged_tokenizer_files

    world = Path(__file__).resolve().parents[1] / "sd3" / "tiny_world" / "model" / "tokenizer"
    assert damaged_tokenizer_files(world) == damaged_tokenizer_files(tiny_model / "tokenizer") == []


@pytest.mark.parametrize("kept", [0, 1, 70])
def test_words_would_be_spelled_without_merges(tmp_path: Path, kept: int) -> None:
    from sd3.common.tokenizer_files import damaged_tokenizer_files

    world = Path(__file__).resolve().parents[1] / "sd3" / "tiny_world" / "model" / "tokenizer"
    folder = Path(shutil.copytree(world, tmp_path / "tokenizer"))
    lines = (world / "merges.txt").read_text().splitlines()
    (folder / "merges.txt").write_text("\n".join(lines[: kept + 1]))
    (problem,) = damaged_tokenizer_files(folder)
    assert problem.startswith("tokenizer/merges.txt lacks ")


def test_loading_names_a_weight_that_is_lacking(model: Path) -> None:
    """Beyond what is checked before the run: the libraries draw what is lacking at random."""
    for kind, part in ((SD3Transformer2DModel, "transformer"), (CLIPTextModelWithProjection, "text_encoder")):
        (file,) = (model / part).glob("*.safetensors")
        tensors = load_file(file)
        lost = sorted(tensors)[0]
        save_file({key: value for key, value in tensors.items() if key != lost}, file, {"format": "pt"})
        with pytest.raises(UserError, match=rf"{part} cannot be loaded \(.*{lost}"):
            load_weights(kind, model / part)


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_dual_attention_that_the_configuration_lacks_is_not_left_out(model: Path, variant: str) -> None:
    name = "transformer_blocks.0.attn2.to_q.weight"
    (file,) = (model / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    file.unlink()
    file = file.with_suffix(f"{variant}.safetensors")
    save_file(tensors | {name: torch.zeros(2, 2)}, file, {"format": "pt"})
    with pytest.raises(UserError, match=f"weights for which the configuration has no place, {name} among them"):
        load_weights(SD3Transformer2DModel, model / "transformer")
    save_file(tensors, file, {"format": "pt"})
    assert load_weights(SD3Transformer2DModel, model / "transformer").state_dict().keys() == tensors.keys()


def test_whatever_the_libraries_raise_is_a_sentence(model: Path) -> None:
    change(model / "transformer" / "config.json", num_attention_heads="many")
    change(model / "scheduler" / "scheduler_config.json", shift="much", num_train_timesteps="x")
    change(model / "tokenizer" / "tokenizer_config.json", added_tokens_decoder=5)
    for load in (
        lambda: load_weights(SD3Transformer2DModel, model / "transformer"),
        lambda: load_scheduler(model / "scheduler"),
        lambda: load_tokenizer(TOKENIZERS["tokenizer"], model / "tokenizer"),
    ):
        with pytest.raises(UserError, match=r"cannot be loaded \(.+\); download it again\."):
            load()


def test_settings_that_are_left_out_have_the_librarys_defaults(model: Path) -> None:
    file = model / "transformer" / "config.json"
    config = json.loads(file.read_text())
    del config["pos_embed_max_size"]
    file.write_text(json.dumps(config))
    assert check_model(str(model)) == []
    assert largest_side(model / "transformer", model / "vae") == 96 * 2 * 8


@pytest.mark.parametrize("part", ["scheduler", "vae", "safety_checker"])
@pytest.mark.parametrize("library", ["evil", "evil.module", "..", "os", "diffusers.evil"])
def test_an_index_that_names_code_of_its_own_is_refused(model: Path, part: str, library: str) -> None:
    """diffusers would run scheduler/evil.py for it."""
    (model / part).mkdir(exist_ok=True)
    (model / part / "evil.py").write_text("raise SystemExit('run')")
    change(model / "model_index.json", **{part: [library, "FlowMatchEulerDiscreteScheduler"]})
    assert f"model_index.json names {part} of {library!r}; expected only classes of" in only_problem(model)
