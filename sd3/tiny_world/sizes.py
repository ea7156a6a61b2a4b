"""The dimensions of the parts that are trained on the world."""

from __future__ import annotations

from sd3.common.model_sizes import Clip, ModelSize

TINY_WORLD = ModelSize(
    clips=(Clip(32, 2, 4, 64, 32), Clip(48, 2, 4, 96, 48)),
    t5_width=96, t5_feed_forward=128, t5_layers=2, t5_heads=4, t5_head_width=16, t5_rows=0,
    vae_channels=(16, 16, 32, 64), vae_layers=1, vae_groups=8,
    layers=5, heads=4, head_width=32, sample_size=8, positions=8, qk_norm="rms_norm",
)  # fmt: skip
