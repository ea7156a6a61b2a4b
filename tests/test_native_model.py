"""What is trained, by which flag, and that what is written is what was trained: no more, no less, nothing mistaken."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file

from lora_files import make_sd35_like, transformer_output
from lora_files import outputs as generating
from native_parts import options
from sd3.common.command_line import UserError
from sd3.common.model_sizes import SIZES, Clip
from sd3.common.tiny_sd3 import make_tiny_sd3
from sd3.native.model import Trained, lora_weights, trainable
from sd3.native.outputs import write_result
from sd3.native.text import ENCODERS

LORA_FILE = "pytorch_lora_weights.safetensors"
CLIPS = ("text_encoder", "text_encoder_2")
ATTENTION = "add_k_proj|add_q_proj|add_v_proj|to_add_out|to_k|to_out.0|to_q|to_v"


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline whose CLIP encoders have the same dimensions, and different weights."""
    folder = tmp_path_factory.mktemp("twins") / "model"
    clip = Clip(40, 2, 4, 64, 40)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "tiny", dataclasses.replace(SIZES["tiny"], clips=(clip, clip)))
        make_tiny_sd3(folder)
    return folder


def trained(model: Path, kind: str, *flags: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Trained:
    """The model as if after some training: every trained parameter has moved, each to a place of its own."""
    with torch.random.fork_rng():  # A begins at random, and so does how much B A changes
        torch.manual_seed(seed)
        made = Trained(options(*flags, kind=kind), kind, model, dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return made


def inputs(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Something for a transformer to work on."""
    generator = torch.Generator().manual_seed(1)
    config = model.config
    return {
        "hidden_states": torch.randn(2, 16, 8, 8, generator=generator),
        "timestep": torch.tensor([100.0, 700.0]),
        "encoder_hidden_states": torch.randn(2, 9, config.joint_attention_dim, generator=generator),
        "pooled_projections": torch.randn(2, config.pooled_projection_dim, generator=generator),
    }


@torch.no_grad()
def outputs(parts: dict[str, torch.nn.Module]) -> dict[str, torch.Tensor]:
    """What each part makes of the same input."""
    found = {"transformer": parts["transformer"](**inputs(parts["transformer"]), return_dict=False)[0]}
    ids = torch.arange(2, 79)[None]
    for name in set(parts) - {"transformer"}:
        result = parts[name](ids, output_hidden_states=True)
        found[name] = torch.cat([state.flatten() for state in result.hidden_states])
    return found


def parts_of(pipeline: StableDiffusion3Pipeline, names: tuple[str, ...]) -> dict[str, torch.nn.Module]:
    return {name: getattr(pipeline, name) for name in names}


# ---- what is trained


@pytest.mark.parametrize("encoders", [False, True])
def test_full_training_trains_all_of_its_parts(tiny_model: Path, encoders: bool) -> None:
    flags = ["--train_text_encoder"] if encoders else []
    made = Trained(options(*flags, kind="full"), "full", tiny_model, torch.bfloat16)
    names = ("transformer", *(ENCODERS if encoders else ()))
    assert tuple(made.parts) == names
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_model, vae=None)
    expected = [f"{name}.{key}" for name in names for key, _ in getattr(pipeline, name).named_parameters()]
    assert made.names() == expected
    wanting = [parameter for parameter in made.denoiser.parameters() if parameter.requires_grad]
    assert {id(parameter) for parameter in made.parameters()} == {id(parameter) for parameter in wanting}
    assert {parameter.dtype for parameter in made.parameters()} == {torch.float32}  # half would lose small updates
    assert (made.denoiser.encoders is None) is not encoders
    assert all(part.training for part in made.parts.values())


def lora_modules(made: Trained, part: str = "transformer") -> set[str]:
    """Names of the modules of a part that have low-rank matrices."""
    return {name.split(".lora_")[0] for name in trainable(made.parts[part])}


@pytest.mark.parametrize(
    ("flags", "pattern"),
    [
        ((), rf"transformer_blocks\.\d+\.attn\.({ATTENTION})"),
        (("--lora_layers=attn.to_k, ff.net.2",), r"transformer_blocks\.\d+\.(attn\.to_k|ff\.net\.2)"),
        (("--lora_blocks=1",), rf"transformer_blocks\.1\.attn\.({ATTENTION})"),
        (("--lora_blocks=0, 1", "--lora_layers=attn.to_v"), r"transformer_blocks\.[01]\.attn\.to_v"),
    ],
)
def test_a_lora_is_where_it_is_asked_for(tiny_model: Path, flags: tuple[str, ...], pattern: str) -> None:
    made = Trained(options(*flags, "--rank=3"), "lora", tiny_model, torch.bfloat16)
    linear = {
        name
        for name, module in SD3Transformer2DModel.from_pretrained(tiny_model / "transformer").named_modules()
        if isinstance(module, torch.nn.Linear) and re.fullmatch(pattern, name)
    }
    assert lora_modules(made) == linear and linear
    assert list(made.parts) == ["transformer"]
    for name, parameter in trainable(made.parts["transformer"]).items():
        assert parameter.dtype == torch.float32
        assert parameter.shape["lora_B" in name] == 3
        assert (parameter == 0).all() if "lora_B" in name else (parameter != 0).any()  # it begins as no change
    frozen = [parameter for parameter in made.denoiser.parameters() if not parameter.requires_grad]
    assert frozen and {parameter.dtype for parameter in frozen} == {torch.bfloat16}


def test_a_lora_with_text_encoders_trains_both_clips(twins: Path) -> None:
    made = Trained(options("--train_text_encoder"), "lora", twins, torch.float32)
    assert tuple(made.parts) == ("transformer", *CLIPS)
    for name in CLIPS:
        assert made.parts[name] is getattr(made.denoiser.encoders, name)
        projections = {
            f"text_model.encoder.layers.{layer}.self_attn.{one}_proj"
            for layer in (0, 1)
            for one in ("q", "k", "v", "out")
        }
        assert lora_modules(made, name) == projections
    assert made.parts["text_encoder"].training and not made.denoiser.encoders.text_encoder_3.training
    assert not any(parameter.requires_grad for parameter in made.denoiser.encoders.text_encoder_3.parameters())


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--lora_blocks=0,2", "--lora_blocks=0,2: the transformer has the blocks 0 to 1"),
        ("--lora_layers=attn.to_k,attn.to_x", "=attn.to_k,attn.to_x: no block has a linear layer attn.to_x"),
        ("--lora_layers=attn", "--lora_layers=attn: no block has a linear layer attn;"),
    ],
)
def test_a_lora_for_what_is_not_there_is_refused(tiny_model: Path, flag: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Trained(options(flag), "lora", tiny_model, torch.float32)


def test_a_block_without_the_layers_is_refused(tiny_model: Path) -> None:
    """The last block's text leads nowhere."""
    flags = ("--lora_blocks=1", "--lora_layers=attn.to_add_out")
    with pytest.raises(UserError, match="--lora_blocks=1: none of them has a linear layer attn.to_add_out"):
        Trained(options(*flags), "lora", tiny_model, torch.float32)


@pytest.mark.parametrize(("flag", "rate"), [("--text_encoder_lr=3e-5", 3e-5), ("--text_encoder_lr=0", 2e-4)])
def test_text_encoders_have_settings_of_their_own(tiny_model: Path, flag: str, rate: float) -> None:
    flags = ("--train_text_encoder", flag, "--adam_weight_decay_text_encoder=0.5")
    made = Trained(options(*flags), "lora", tiny_model, torch.float32)
    transformer, *encoders = made.groups(2e-4)
    assert transformer["lr"] == 2e-4 and "weight_decay" not in transformer
    assert [(group["lr"], group["weight_decay"]) for group in encoders] == [(rate, 0.5)] * 2
    grouped = [parameter for group in (transformer, *encoders) for parameter in group["params"]]
    assert [id(parameter) for parameter in grouped] == [id(parameter) for parameter in made.parameters()]


# ---- memory


def gradients(model: Path, *flags: str) -> tuple[list[torch.Tensor], list[int]]:
    """Gradients of all parameters, and how often each block's attention ran for them."""
    made = trained(model, "full", "--train_text_encoder", *flags)
    made.denoiser.encoders.text_encoder_3.eval()  # its dropout is drawn anew, in another order
    calls = [0, 0]
    for number, block in enumerate(made.parts["transformer"].transformer_blocks):

        def count(*_: object, number: int = number) -> None:
            calls[number] += 1

        block.attn.register_forward_hook(count)
    given = inputs(made.parts["transformer"])
    ids = [torch.arange(2, 79)[None].expand(2, -1) for _ in range(3)]
    made.denoiser(given["hidden_states"], given["timestep"], *ids).square().mean().backward()
    return [parameter.grad for parameter in made.parameters()], calls


@pytest.mark.parametrize(("blocks", "calls"), [("all", [2, 2]), ("1", [1, 2]), ("none", [1, 1])])
def test_recomputation_changes_no_gradient(tiny_model: Path, blocks: str, calls: list[int]) -> None:
    plain, once = gradients(tiny_model)
    assert once == [1, 1]
    recomputed, found = gradients(tiny_model, "--gradient_checkpointing", f"--checkpointed_blocks={blocks}")
    assert found == calls
    assert all(torch.equal(one, other) for one, other in zip(plain, recomputed, strict=True))


def test_blocks_that_are_not_there_cannot_be_recomputed(tiny_model: Path) -> None:
    with pytest.raises(UserError, match="the transformer has the blocks 0 to 1"):
        trained(tiny_model, "lora", "--gradient_checkpointing", "--checkpointed_blocks=0-2")


# ---- what is written


@pytest.mark.parametrize("flags", [("--rank=4",), ("--rank=7", "--train_text_encoder"), ("--lora_blocks=1",)])
def test_a_lora_file_changes_a_pipeline_by_what_was_trained(
    twins: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    made = trained(twins, "lora", *flags)
    write_result(made, twins, tmp_path, torch.float32)
    assert [file.name for file in tmp_path.iterdir()] == [LORA_FILE]
    pipeline = StableDiffusion3Pipeline.from_pretrained(twins, vae=None, text_encoder_3=None, tokenizer_3=None)
    parts = parts_of(pipeline, tuple(made.parts))
    before = outputs(parts)
    merged = copy.deepcopy(parts)
    for name, part in made.parts.items():
        matrices = trainable(part)
        for down in (key for key in matrices if ".lora_A." in key):
            weight = merged[name].get_parameter(down.split(".lora_A.")[0] + ".weight")
            weight.data += matrices[down.replace("lora_A", "lora_B")].detach() @ matrices[down].detach()
    pipeline.load_lora_weights(tmp_path, weight_name=LORA_FILE)
    loaded, in_training, by_hand = outputs(parts), outputs(made.parts), outputs(merged)
    assert set(loaded) == set(made.parts)
    for name, after in loaded.items():
        assert torch.equal(after, in_training[name])
        torch.testing.assert_close(after, by_hand[name], rtol=1e-4, atol=1e-5)
        assert (after - before[name]).abs().max() > 0.01


@pytest.mark.parametrize("upcast", [False, True])
def test_a_lora_file_has_the_runs_precision_unless_upcast(twins: Path, tmp_path: Path, upcast: bool) -> None:
    flags = ("--train_text_encoder", *(["--upcast_before_saving"] if upcast else []))
    made = trained(twins, "lora", *flags, dtype=torch.bfloat16)
    write_result(made, twins, tmp_path, torch.bfloat16)
    weights = load_file(tmp_path / LORA_FILE)
    for part in made.parts:
        own = {key: value for key, value in weights.items() if key.startswith(f"{part}.")}
        assert {value.dtype for value in own.values()} == {
            torch.bfloat16 if part == "transformer" and not upcast else torch.float32
        }
        for key, value in lora_weights(made.parts[part]).items():
            assert torch.equal(own[f"{part}.{key}"], value.to(own[f"{part}.{key}"].dtype))
    assert {parameter.dtype for parameter in made.parameters()} == {torch.float32}  # the model is as it was


@pytest.mark.parametrize("flags", [(), ("--rank=7", "--train_text_encoder"), ("--lora_blocks=1", "--rank=2")])
def test_a_lora_file_states_its_strength_as_diffusers_does(
    twins: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    """From 0.34 on: PEFT's settings as JSON in the header, each behind the part's name."""
    made = trained(twins, "lora", *flags)
    made.write_weights(tmp_path)
    with safe_open(tmp_path / LORA_FILE, framework="pt") as file:
        stated = json.loads(file.metadata()["lora_adapter_metadata"])
        assert file.metadata()["format"] == "pt"
    assert {key.split(".")[0] for key in stated} == set(made.parts)
    for name, part in made.parts.items():
        own = {key.removeprefix(f"{name}."): value for key, value in stated.items() if key.startswith(f"{name}.")}
        config = LoraConfig(**own)
        assert config.r == config.lora_alpha == made.options.rank
        assert config.target_modules == part.peft_config["default"].target_modules
        assert not (config.rank_pattern or config.alpha_pattern or config.use_rslora or config.use_dora)
    # The tensors are those that the pipeline itself writes.
    layers = {f"{name}_lora_layers": lora_weights(part) for name, part in made.parts.items()}
    StableDiffusion3Pipeline.save_lora_weights(tmp_path / "plain", **layers)
    found, plain = load_file(tmp_path / LORA_FILE), load_file(tmp_path / "plain" / LORA_FILE)
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[key], plain[key]) for key in plain)


def test_the_second_attention_of_sd35_medium_is_trained_where_it_is_named(tmp_path: Path) -> None:
    model = make_sd35_like(tmp_path / "model")
    assert not any("attn2" in name for name in trained(model, "lora").names())
    made = trained(model, "lora", "--lora_layers=attn2.to_q,attn2.to_out.0,attn.to_k")
    changed = {name.split(".lora_")[0] for name in made.names()}
    assert changed == {
        "transformer.transformer_blocks.0.attn2.to_q", "transformer.transformer_blocks.0.attn2.to_out.0",
        "transformer.transformer_blocks.0.attn.to_k", "transformer.transformer_blocks.1.attn.to_k",
    }  # fmt: skip
    made.write_weights(tmp_path)
    assert torch.equal(
        transformer_output(made.parts["transformer"].eval()), generating(model, tmp_path)["transformer"]
    )


def bytes_below(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("flags", [(), ("--train_text_encoder",)])
def test_a_full_result_is_a_pipeline_of_trained_and_untouched_parts(
    twins: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    made = trained(twins, "full", *flags)
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "of an earlier run").write_text("")
    (tmp_path / "checkpoint-1").mkdir()
    write_result(made, twins, tmp_path, torch.bfloat16)
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path)
    for name, part in made.parts.items():
        saved = getattr(pipeline, name).state_dict()
        assert saved.keys() == part.state_dict().keys()
        assert all(torch.equal(value, part.state_dict()[key]) for key, value in saved.items())
    before, after = bytes_below(twins), bytes_below(tmp_path)
    assert after.keys() == before.keys()
    trained_files = {name for name in before if name.split("/")[0] in made.parts and name.endswith(".safetensors")}
    assert {name for name in before if before[name] != after[name] and not name.endswith(".json")} == trained_files
    untouched = {name for name in before if name.split("/")[0] not in made.parts} - {"model_index.json"}
    # Generation finds the length of the prompts there; diffusers passes over it.
    indices = (json.loads(files["model_index.json"]) for files in (before, after))
    assert next(indices) | {"_max_sequence_length": 77} == next(indices)
    assert all(before[name] == after[name] for name in untouched)
    assert (tmp_path / "checkpoint-1").is_dir()


def test_a_models_index_cannot_name_folders_that_are_no_parts(twins: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(twins, tmp_path / "models" / "crafted"))
    index = json.loads((model / "model_index.json").read_text(encoding="utf-8"))
    for name in ("../secrets", "checkpoint-1", "logs"):
        (model / name).mkdir(exist_ok=True)
        (model / name / "file").write_text("crafted")
        index[name] = ["diffusers", "AutoencoderKL"]
    (model / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    output = tmp_path / "runs" / "output"
    (output / "checkpoint-1").mkdir(parents=True)
    write_result(trained(model, "full"), model, output, torch.bfloat16)
    assert (output / "vae" / "config.json").is_file()
    assert not list(output.parent.rglob("file"))


def test_a_variants_result_loads_without_it(tiny_model: Path, tmp_path: Path) -> None:
    StableDiffusion3Pipeline.from_pretrained(tiny_model, torch_dtype=torch.float16).save_pretrained(
        tmp_path / "model", variant="fp16"
    )
    made = trained(tmp_path / "model", "full", "--variant=fp16")
    (tmp_path / "out").mkdir()
    write_result(made, tmp_path / "model", tmp_path / "out", torch.float16)
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path / "out", text_encoder_3=None, tokenizer_3=None)
    expected = made.parts["transformer"].state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in pipeline.transformer.state_dict().items())
    for name in ("vae", *ENCODERS):
        (before,), (after,) = ((folder / name).glob("*.safetensors") for folder in (tiny_model, tmp_path / "out"))
        weights, found = load_file(before), load_file(after)
        assert weights.keys() == found.keys()
        for key, value in found.items():
            torch.testing.assert_close(value.float(), weights[key], rtol=1e-3, atol=1e-6)


def test_a_result_that_is_replaced_half_is_no_pipeline(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill between two parts must not leave parts of two results under an index that says they are one."""
    made = trained(tiny_model, "full")
    write_result(made, tiny_model, tmp_path, torch.float32)
    true_replace, calls = os.replace, iter(range(1, 100))

    def replace(source: Path, target: Path) -> None:
        if next(calls) == 4:
            raise KeyboardInterrupt
        true_replace(source, target)

    monkeypatch.setattr("sd3.native.outputs.os.replace", replace)
    with pytest.raises(KeyboardInterrupt):
        write_result(made, tiny_model, tmp_path, torch.float32)
    assert not (tmp_path / "model_index.json").exists()


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_result_that_cannot_be_written_leaves_the_earlier_one(
    tiny_model: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trained(tiny_model, kind)
    write_result(made, tiny_model, tmp_path, torch.float32)
    before = bytes_below(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 1
    monkeypatch.setattr("sd3.native.outputs.sync", full)
    with pytest.raises(UserError, match=f"could not be written to {tmp_path} .*No space left") as error:
        write_result(made, tiny_model, tmp_path, torch.float32)
    assert error.value.status == 1
    assert bytes_below(tmp_path) == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
