"""The counted costs are the known ones, and the proportional model keeps SD3 medium's proportions."""

from __future__ import annotations

import pytest

from sd3.common import flops
from sd3.common.model_sizes import SIZES

MEDIUM, SMALL = SIZES["sd3-medium"], SIZES["proportional"]
TEXT_TOKENS = 77 + 256
SCALE = 2000


def test_sd3_medium_costs_what_is_known() -> None:
    """Counted once by hand, see the README; 154 text tokens are those of training, 333 those of painting."""
    assert flops.transformer_cost(MEDIUM, 1024, 154).flops == pytest.approx(8.4e12, rel=0.01)
    assert flops.t5_cost(MEDIUM, 77).flops == pytest.approx(0.7e12, rel=0.03)
    assert flops.transformer_cost(MEDIUM, 1024, TEXT_TOKENS).parameters == pytest.approx(2.03e9, rel=0.005)


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


def test_the_proportional_model_keeps_the_share_of_memory() -> None:
    """What a card holds is weights: T5 against the transformer decides how much letting encoders go saves."""
    large, small = (
        flops.t5_cost(size, 256).parameters / flops.transformer_cost(size, 256, TEXT_TOKENS).parameters
        for size in (MEDIUM, SMALL)
    )
    assert small == pytest.approx(large, rel=0.05)
