"""The counted costs are the known ones, and the proportional model keeps SD3 medium's proportions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch.utils.flop_counter import FlopCounterMode

from sd3.common import flops
from sd3.common.model_sizes import SIZES, ModelSize, size_of
from sd3.native.utilization import work_of

MEDIUM, SMALL = SIZES["sd3-medium"], SIZES["proportional"]
TEXT_TOKENS = 77 + 256
SCALE = 2000


def test_sd3_medium_costs_what_is_known() -> None:
    """Counted once by hand, see the README; 154 text tokens are those of training, 333 those of painting."""
    assert flops.transformer_cost(MEDIUM, 1024, 154).flops == pytest.approx(8.4e12, rel=0.01)
    assert flops.t5_cost(MEDIUM, 77).flops == pytest.approx(0.7e12, rel=0.03)
    assert flops.transformer_cost(MEDIUM, 1024, TEXT_TOKENS).parameters == pytest.approx(2.03e9, rel=0.005)
    assert flops.encoder_cost(MEDIUM, 1024).flops == pytest.approx(4.9e12, rel=0.01)


def test_sd35_large_has_its_parameters() -> None:
    """8.1 billion, as its makers state."""
    assert flops.transformer_cost(SIZES["sd3.5-large"], 1024, 154).parameters == pytest.approx(8.1e9, rel=0.01)


# As published, transformer/config.json of SD3.5 medium: the image attends to itself once more in the first 13 blocks.
SD35_MEDIUM = {
    "attention_head_dim": 64, "caption_projection_dim": 1536, "dual_attention_layers": list(range(13)),
    "in_channels": 16, "joint_attention_dim": 4096, "num_attention_heads": 24, "num_layers": 24, "out_channels": 16,
    "patch_size": 2, "pooled_projection_dim": 2048, "pos_embed_max_size": 384, "qk_norm": "rms_norm",
    "sample_size": 128,
}  # fmt: skip


def test_dual_attention_is_counted() -> None:
    """SD3.5 medium: 2.5 billion parameters, as its makers state, with the table of positions."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        SD3Transformer2DModel.from_config(SD35_MEDIUM)(
            torch.empty(1, 16, 128, 128), encoder_hidden_states=torch.empty(1, 154, 4096),
            pooled_projections=torch.empty(1, 2048), timestep=torch.empty(1),
        )  # fmt: skip
    cost = flops.transformer_cost(SIZES["sd3.5-medium"], 1024, 154)
    assert cost.flops == counter.get_total_flops() > 1.2 * flops.transformer_cost(MEDIUM, 1024, 154).flops
    assert cost.parameters + 384**2 * 1536 == pytest.approx(2.5e9, rel=0.02)
    assert work_of(SD35_MEDIUM, 1024, 154, lora=False) == 3 * cost.flops


def test_the_size_of_a_pipeline_has_its_dual_attention(tiny_model: Path, tmp_path: Path) -> None:
    parts = {part.name: part for part in tiny_model.iterdir() if part.is_dir()}
    (tmp_path / "config.json").write_text(json.dumps(SD35_MEDIUM))
    found = size_of({**parts, "transformer": tmp_path})
    assert found.dual_layers == SIZES["sd3.5-medium"].dual_layers
    assert size_of(parts).dual_layers == ()


@pytest.mark.parametrize(
    ("cost", "resolutions"),
    [
        (lambda size, side: flops.transformer_cost(size, side, TEXT_TOKENS), (1024, 256)),
        (lambda size, side: flops.decoder_cost(size, side), (1024, 256)),
        (lambda size, side: flops.t5_cost(size, 256), (1024, 256)),
        (lambda size, side: flops.clip_cost(size), (1024, 256)),
    ],
    ids=["transformer", "decoder", "t5", "clip"],
)
def test_the_proportional_model_costs_a_two_thousandth(cost, resolutions: tuple[int, int]) -> None:
    large, small = (cost(size, side).flops for size, side in zip((MEDIUM, SMALL), resolutions, strict=True))
    assert large / small == pytest.approx(SCALE, rel=0.05)


@pytest.mark.parametrize("name", ["proportional", "proportional-1024", "proportional-512"])
def test_the_proportional_model_keeps_the_share_of_memory(name: str) -> None:
    """What a card holds is weights: T5 against the transformer decides how much letting encoders go saves."""
    large, small = (
        flops.t5_cost(size, 77).parameters / flops.transformer_cost(size, 128, TEXT_TOKENS).parameters
        for size in (MEDIUM, SIZES[name])
    )
    assert small == pytest.approx(large, rel=0.05)


def training_shares(size: ModelSize, side: int) -> list[float]:
    """VAE encoder, T5 and CLIP over one forward pass of the transformer; its backward pass is a multiple of that."""
    forward = flops.transformer_cost(size, side, 154).flops
    beside = flops.encoder_cost(size, side), flops.t5_cost(size, 77), flops.clip_cost(size)
    return [cost.flops / forward for cost in beside]


@pytest.mark.parametrize(
    ("resolution", "transformer", "encoder", "t5"), [(1024, 8.4, 4.9, 0.7), (512, 1.8, 1.1, 0.7)], ids=["1024", "512"]
)
def test_the_proportional_models_cost_in_training_what_sd3_medium_does(
    resolution: int, transformer: float, encoder: float, t5: float
) -> None:
    """TFLOP for one picture, counted by hand, and then what is counted here."""
    small = training_shares(SIZES[f"proportional-{resolution}"], 128)
    assert small[:2] == pytest.approx([encoder / transformer, t5 / transformer], rel=0.05)
    assert small == pytest.approx(training_shares(MEDIUM, resolution), rel=0.05)
