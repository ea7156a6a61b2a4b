"""A LoRA file counts as strongly as its writer states, in every layout; what is not known is refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from PIL import Image

from lora_files import CLIP, MODULES, make_sd35_like, merged, names, outputs, pairs, spelt, transformer_output, write
from painting import SMALL
from sd3.common.command_line import UserError
from sd3.inference.run import generate
from sd3.inference.sources import find_sources
from sd3.inference.weights import Weights
from sd3.model import lora_settings
from sd3.model.lora_file import read_lora
from sd3.model.lora_layers import add_lora

ALL = names()
RANKS = {name: 4 for name in ALL}
MIXED = {name: (2, 4, 6)[number % 3] for number, name in enumerate(ALL)}
Q = "text_encoder", f"{CLIP}.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sd35_like(tmp_path_factory.mktemp("sd35") / "model")


def check(model: Path, tmp_path: Path, lora: Path, matrices: dict, scales: dict, scale: float = 1.0) -> None:
    """The parts with the LoRA make what parts with merged weights make, and something else than those without it."""
    merged_in = merged(model, tmp_path / "merged", matrices, {name: scale * value for name, value in scales.items()})
    found, expected, before = outputs(model, lora, scale), outputs(merged_in), outputs(model)
    for part in {part for part, _ in matrices}:
        torch.testing.assert_close(found[part], expected[part], rtol=1e-4, atol=2e-5)
        assert (found[part] - before[part]).abs().max() > 0.01
    layers = read_lora(find_sources(str(model), str(lora)).lora, {})
    for (part, module), value in scales.items():
        assert layers.parts[part][module].scale == pytest.approx(value, rel=1e-6)


def settings(**parts: dict[str, object]) -> dict[str, object]:
    return {f"{part}.{name}": value for part, own in parts.items() for name, value in own.items()}


# ---- strength


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_alpha_in_the_header_counts_for_each_part(model: Path, tmp_path: Path, scale: float) -> None:
    matrices = pairs(model, RANKS)
    stated = settings(
        transformer={"r": 4, "lora_alpha": 1, "target_modules": ["to_q"], "peft_type": "LORA", "use_dora": False},
        text_encoder={"r": 4, "lora_alpha": 6.0}, text_encoder_2={"r": 4, "lora_alpha": 4, "init_lora_weights": "eva"},
    )  # fmt: skip
    lora = write(tmp_path / "lora.safetensors", spelt(matrices), stated)
    by_part = {"transformer": 0.25, "text_encoder": 1.5, "text_encoder_2": 1.0}
    check(model, tmp_path, lora, matrices, {name: by_part[name[0]] for name in ALL}, scale)


def test_several_ranks_count_fully_where_nothing_states_alpha(model: Path, tmp_path: Path) -> None:
    matrices = pairs(model, MIXED)
    lora = write(tmp_path / "lora.safetensors", spelt(matrices))
    check(model, tmp_path, lora, matrices, dict.fromkeys(ALL, 1.0))


@pytest.mark.parametrize("name", ["float64", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_alpha_tensors_count_in_every_dtype(model: Path, tmp_path: Path, name: str) -> None:
    dtype = getattr(torch, name)
    matrices = {name: tuple(m.to(dtype) for m in pair) for name, pair in pairs(model, MIXED).items()}
    alphas = {name: (1.0, 3.0, 8.0)[number % 3] for number, name in enumerate(ALL[:-1])}
    tensors = {f"{part}.{module}.alpha": torch.tensor(alpha).to(dtype) for (part, module), alpha in alphas.items()}
    lora = write(tmp_path / "lora.safetensors", tensors | spelt(matrices))
    scales = {name: alpha / MIXED[name] for name, alpha in alphas.items()} | {ALL[-1]: 1.0}
    check(model, tmp_path, lora, {name: tuple(m.float() for m in pair) for name, pair in matrices.items()}, scales)


CONFIGS = {
    "patterns": {
        "rank_pattern": {"transformer_blocks.0.attn.to_q": 2, "to_out.0": 6, "attn2.to_q": 3},
        "alpha_pattern": {r"blocks\.[01]\.attn.to_q": 7, "ff.net.0.proj": 1, "attn2.to_out.0": 0.5},
    },
    "anchored": {"rank_pattern": {"^proj_out": 2}, "alpha_pattern": {"^transformer_blocks.0.attn.*": 3}},
    "stabilized": {"use_rslora": True, "rank_pattern": {"attn.to_k": 1}},
}


@pytest.mark.parametrize("layout", ["pipeline", "model", "peft"])
@pytest.mark.parametrize("config", CONFIGS)
def test_patterns_mean_what_they_mean_to_peft(model: Path, tmp_path: Path, config: str, layout: str) -> None:
    """PEFT's own layers are the measure: the file is as it saves it, or as diffusers from 0.34 on does."""
    transformer = SD3Transformer2DModel.from_pretrained(model / "transformer")
    given = LoraConfig(
        r=4, lora_alpha=10, target_modules=list(MODULES["transformer"]), init_lora_weights=False, **CONFIGS[config]
    )
    torch.manual_seed(5)
    wrapped = get_peft_model(transformer, given)
    if layout == "peft":
        wrapped.save_pretrained(tmp_path)
        lora = tmp_path
    else:
        start = "transformer." if layout == "pipeline" else ""
        state = get_peft_model_state_dict(wrapped)
        tensors = {start + key.removeprefix("base_model.model."): value for key, value in state.items()}
        stated = {start + key: value for key, value in wrapped.peft_config["default"].to_dict().items()}
        stated[f"{start}target_modules"] = sorted(stated[f"{start}target_modules"])
        lora = write(tmp_path / "lora.safetensors", tensors, stated)
    expected = transformer_output(wrapped.base_model.model)
    found = outputs(model, lora)["transformer"]
    assert torch.equal(found, expected)
    assert (found - outputs(model)["transformer"]).abs().max() > 0.01


def test_images_are_those_of_merged_weights(model: Path, tmp_path: Path) -> None:
    matrices = pairs(model, MIXED)
    stated = settings(
        transformer={"r": 4, "lora_alpha": 2, "rank_pattern": {m: MIXED[p, m] for p, m in names("transformer")}},
        text_encoder={"r": 4, "lora_alpha": 2, "rank_pattern": {m: MIXED[p, m] for p, m in names("text_encoder")}},
    )  # fmt: skip
    lora = write(tmp_path / "lora.safetensors", spelt(matrices), stated)
    scales = {name: 1.0 if name[0] == "text_encoder_2" else 2 / MIXED[name] for name in ALL}
    by_hand = merged(model, tmp_path / "merged", matrices, scales)
    images = []
    sources = [f"--model={model}"], [f"--model={model}", f"--lora={lora}"], [f"--model={by_hand}"]
    for number, source in enumerate(sources):
        folder = tmp_path / str(number)
        assert generate([*source, "--prompt=a red dog", "--seeds", "1", f"--output-dir={folder}", *SMALL]) == 0
        (file,) = (path for path in folder.glob("*.png") if "contact" not in path.name)
        images.append(np.asarray(Image.open(file).convert("RGB")).astype(int))
    base, with_lora, expected = images
    assert abs(with_lora - expected).max() <= 1
    assert abs(with_lora - base).max() > 10


def test_a_change_of_the_strength_beside_the_file_is_another_lora(model: Path, tmp_path: Path) -> None:
    form = "base_model.model.{module}.lora_{side}.weight"
    write(tmp_path / "adapter_model.safetensors", spelt(pairs(model, {ALL[0]: 4}), form))
    hashes = set()
    for alpha in (4, 8):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": alpha, "peft_type": "LORA"}))
        sources = find_sources(str(model), str(tmp_path))
        hashes.add(sources.lora_hash())
        assert sources.lora_file.parts["transformer"][ALL[0][1]].scale == alpha / 4
    assert len(hashes) == 2


@pytest.mark.parametrize("start", ["transformer.", ""])
@pytest.mark.parametrize("own", ["transformer.", ""])
def test_keys_and_header_may_name_the_only_part_or_not(model: Path, tmp_path: Path, start: str, own: str) -> None:
    tensors = spelt(pairs(model, {ALL[0]: 4}), start + "{module}.lora_{side}.weight")
    lora = write(tmp_path / "lora.safetensors", tensors, {f"{own}r": 4, f"{own}lora_alpha": 6})
    (found,) = find_sources(str(model), str(lora)).lora_file.parts["transformer"].values()
    assert found.scale == 1.5


# ---- spellings


@pytest.mark.parametrize(
    ("form", "alpha"),
    [
        ("{part}.{module}.lora_{side}.default.weight", "{part}.{module}.alpha"),
        ("{part}.{module}.lora.{way}.weight", "{part}.{module}.lora.alpha"),
        ("{part}.{module}.lora_linear_layer.{way}.weight", "{part}.{module}.lora_linear_layer.alpha"),
    ],
)
def test_other_spellings_are_the_same_lora(model: Path, tmp_path: Path, form: str, alpha: str) -> None:
    matrices = pairs(model, MIXED)
    tensors = spelt(matrices, form)
    tensors |= {alpha.format(part=part, module=module): torch.tensor([2.0]) for part, module in ALL[::2]}
    lora = write(tmp_path / "lora.safetensors", tensors)
    scales = {name: 2 / MIXED[name] if number % 2 == 0 else 1.0 for number, name in enumerate(ALL)}
    check(model, tmp_path, lora, matrices, scales)


def test_text_encoders_by_their_old_names(model: Path, tmp_path: Path) -> None:
    attention = [name for name in names("text_encoder", "text_encoder_2") if "self_attn" in name[1]]
    matrices = pairs(model, dict.fromkeys(attention, 4))
    old = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
    tensors = {}
    for (part, module), pair in matrices.items():
        stem, _, last = module.rpartition(".")
        for way, matrix in zip(("down", "up"), pair, strict=True):
            tensors[f"{part}.{stem}.{old[last]}_lora.{way}.weight"] = matrix
    lora = write(tmp_path / "lora.safetensors", tensors, settings(text_encoder={"r": 4, "lora_alpha": 2}))
    check(model, tmp_path, lora, matrices, {name: 0.5 if name[0] == "text_encoder" else 1.0 for name in attention})


# ---- refusals


def refused(model: Path, tmp_path: Path, tensors: dict[str, torch.Tensor], stated: object = None) -> str:
    lora = write(tmp_path / "lora.safetensors", tensors, stated)
    with pytest.raises(UserError) as error:
        find_sources(str(model), str(lora))
    assert error.value.status == 2
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"--lora={lora} ")
    return str(error.value)


FIRST = "transformer.transformer_blocks.0.attn.to_q"


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (f"{FIRST}.lora_magnitude_vector", "which is of a DoRA"),
        (f"{FIRST}.dora_scale", "which is of a DoRA"),
        (f"{FIRST}.lokr_w1", "which is of a LoKr"),
        (f"{FIRST}.hada_w1_a", "which is of a LoHa"),
        (f"{FIRST}.lora_B.bias", ""),
        (f"{FIRST}.lora_mid.weight", ""),
        (f"{FIRST}_lora.down.weight", ""),
        (f"{FIRST}.diff", ""),
        ("transformer.lora_A.weight", ""),
        ("text_encoder_3.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight", ""),
        ("lora_unet_joint_blocks_0_context_block_attn_qkv.lora_down.weight", ""),
        ("lora_te1_text_model_encoder_layers_0_self_attn_q_proj.alpha", ""),
        ("diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_A.weight", ""),
        ("base_model.model.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight", ""),
        ("unet.mid_block.lora_A.weight", ""),
        ("lora_A.weight", ""),
        (".alpha", ""),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_what_is_not_known_is_refused_by_its_key(
    model: Path, tmp_path: Path, key: str, said: str, first: bool
) -> None:
    others = spelt(pairs(model, RANKS))
    tensors = {} if first else others
    text = refused(model, tmp_path, tensors | {key: torch.ones(4, 4)})
    assert f"is not a LoRA of SD3 in diffusers' format (it holds {key}" in text
    assert said in text


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ("{", "is not a JSON object"),
        ("[]", "is not a JSON object"),
        ("[" * 100_000, "is not a JSON object"),
        ({"r": 4, "lora_alpha": 4}, "does not say which part it is for"),
        (settings(transformer={"r": 8, "lora_alpha": 8}), "rank 8 for norm_out.linear, whose matrices have rank 4"),
        (settings(transformer={"r": 4, "lora_alpha": 4, "rank_pattern": {"proj_out": 2}}), "rank 2 for proj_out"),
        (settings(transformer={"r": 4}), "without lora_alpha"),
        (settings(transformer={"target_modules": ["to_q"]}), "without lora_alpha"),
        (settings(text_encoder={"r": 4, "lora_alpha": "4"}), "lora_alpha '4', expected a number"),
        (settings(text_encoder={"r": 4, "lora_alpha": True}), "lora_alpha True"),
        (settings(text_encoder={"r": 4, "lora_alpha": math.nan}), "lora_alpha nan"),
        (settings(text_encoder={"r": 4, "lora_alpha": 10**400}), "expected a number"),
        (settings(text_encoder={"r": 4.5, "lora_alpha": 4}), "r 4.5, expected a whole number"),
        (settings(text_encoder={"r": 0, "lora_alpha": 4}), "r 0, expected a whole number"),
        (settings(text_encoder={"r": 4, "lora_alpha": 4, "alpha_pattern": {"(": 4}}), "expected names with numbers"),
        (settings(text_encoder={"r": 4, "lora_alpha": 4, "alpha_pattern": [4]}), "expected names with numbers"),
        (settings(text_encoder={"r": 4, "lora_alpha": 4, "use_dora": True}), "has use_dora, which is not supported"),
        (settings(text_encoder={"r": 4, "lora_alpha": 4, "lora_bias": True}), "has lora_bias"),
        (settings(text_encoder={"r": 4, "peft_type": "LOKR"}), "says LOKR"),
        (settings(text_encoder={"r": 4, "lora_alpha": 4, "init_lora_weights": "pissa_niter_4"}), "pissa_niter_4"),
    ],
)
def test_settings_that_cannot_be_followed(model: Path, tmp_path: Path, stated: object, said: str) -> None:
    assert said in refused(model, tmp_path, spelt(pairs(model, RANKS)), stated)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({f"{FIRST}.alpha": torch.tensor(3.0)}, "alpha 4 for transformer_blocks.0.attn.to_q and has a tensor of 3"),
        ({f"{FIRST}.alpha": torch.ones(2)}, "is not one floating-point number"),
        ({f"{FIRST}.alpha": torch.tensor(4)}, "is not one floating-point number"),
        ({f"{FIRST}.alpha": torch.tensor(math.inf)}, "alpha of transformer_blocks.0.attn.to_q is inf"),
        ({f"{FIRST}.lora.down.weight": torch.ones(4, 64)}, f"holds {FIRST} twice"),
        ({"transformer.pos_embed.proj.alpha": torch.tensor(4.0)}, "half of transformer.pos_embed.proj is missing"),
        ({"proj_out.lora_A.weight": torch.ones(4, 64)}, "names the part of the pipeline in some keys"),
        ({f"{FIRST}.lora_A.weight": torch.ones(4, 64, dtype=torch.int8)}, "in I8; expected one of"),
        ({f"{FIRST}.lora_A.weight": torch.ones(0, 64), f"{FIRST}.lora_B.weight": torch.ones(64, 0)}, "has rank 0"),
    ],
)  # fmt: skip
def test_tensors_that_contradict_each_other(model: Path, tmp_path: Path, more: dict, said: str) -> None:
    stated = settings(transformer={"r": 4, "lora_alpha": 4})
    assert said in refused(model, tmp_path, spelt(pairs(model, RANKS)) | more, stated)


@pytest.mark.parametrize("module", ["transformer_blocks.0.attn.norm_q", "pos_embed.proj"])
def test_modules_that_are_no_linear_layers(model: Path, tmp_path: Path, module: str) -> None:
    tensors = {f"transformer.{module}.lora_{side}.weight": torch.ones(4, 4) for side in "AB"}
    assert f"{module} is not a linear layer" in refused(model, tmp_path, tensors)
    embedding = f"text_encoder.{CLIP.replace('encoder.layers', 'embeddings.token_embedding')}"
    tensors = {f"{embedding}.lora_{side}.weight": torch.ones(4, 4) for side in "AB"}
    assert "token_embedding is not a linear layer" in refused(model, tmp_path, tensors)


def test_an_adapter_of_peft_without_its_settings(model: Path, tmp_path: Path) -> None:
    tensors = spelt(pairs(model, {ALL[0]: 4}), "base_model.model.{module}.lora_{side}.weight")
    assert "whose strength is stated in adapter_config.json" in refused(model, tmp_path, tensors)
    (tmp_path / "adapter_config.json").write_text("{")
    assert "adapter_config.json is not a JSON object" in refused(model, tmp_path, tensors)


def test_a_directory_with_two_loras(model: Path, tmp_path: Path) -> None:
    for name in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors"):
        write(tmp_path / name, spelt(pairs(model, {ALL[0]: 4})))
    with pytest.raises(UserError, match="holds both"):
        find_sources(str(model), str(tmp_path))


@pytest.mark.parametrize(
    "header", [b"[]", b'{"a": 1}', b'{"a": {"dtype": "F32", "shape": []}}', b'{"__metadata__": [1]}', b"[" * 9000]
)
def test_headers_that_are_none(model: Path, tmp_path: Path, header: bytes) -> None:
    lora = tmp_path / "lora.safetensors"
    lora.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(UserError, match="has no safetensors header; give the .safetensors file of a LoRA"):
        find_sources(str(model), str(lora))


def test_shapes_that_are_no_numbers(model: Path, tmp_path: Path) -> None:
    entries = {
        f"{FIRST}.lora_{side}.weight": {"dtype": "F32", "shape": ["4", 64], "data_offsets": [0, 0]} for side in "AB"
    }
    header = json.dumps(entries).encode()
    lora = tmp_path / "lora.safetensors"
    lora.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(UserError, match="is not a matrix"):
        find_sources(str(model), str(lora))


def test_a_header_that_the_tensors_do_not_fit(model: Path, tmp_path: Path) -> None:
    """Found when the LoRA is read, which is before any weights are."""
    lora = write(tmp_path / "lora.safetensors", spelt(pairs(model, {ALL[0]: 4})))
    content = lora.read_bytes()
    lora.write_bytes(content.replace(b'"F32"', b'"F16"'))
    with pytest.raises(UserError, match="is damaged .*; train or copy it again"):
        Weights(find_sources(str(model), str(lora)), torch.float32, 1.0)


def test_layers_are_checked_where_the_models_headers_cannot_be_read(model: Path, tmp_path: Path) -> None:
    lora = write(tmp_path / "lora.safetensors", spelt(pairs(model, {ALL[0]: 4})))
    found = read_lora(lora, {})
    modules = found.parts["transformer"]
    with pytest.raises(ValueError, match="there is no linear layer transformer_blocks.0.attn.to_q"):
        add_lora(torch.nn.ModuleDict({"transformer_blocks": torch.nn.Linear(4, 4)}), modules, found.tensors())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e5m2])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_matrices_that_are_no_numbers_are_refused_by_key(
    model: Path, tmp_path: Path, value: float, dtype: torch.dtype
) -> None:
    matrices = pairs(model, RANKS)
    (part, module), (down, _) = next(iter(matrices.items()))
    down[-1, -1] = value
    tensors = {key: tensor.to(dtype) for key, tensor in spelt(matrices).items()}
    lora = write(tmp_path / "lora.safetensors", tensors)
    with pytest.raises(UserError, match=rf"lora={lora} is damaged: {part}\.{module}\..+ holds NaN or infinity; train"):
        Weights(find_sources(str(model), str(lora)), torch.float32, 1.0)


def test_a_pattern_that_takes_for_ever_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora_settings, "PATTERN_SECONDS", 0.2)
    stated = settings(transformer={"r": 4, "lora_alpha": 4, "alpha_pattern": {r"((\w|.)+)+(?<!j)": 4}})
    lora = write(tmp_path / "lora.safetensors", spelt(pairs(model, RANKS)), stated)
    with pytest.raises(UserError, match="its pattern .* does not come to an end; give the file as it was trained"):
        find_sources(str(model), str(lora))
