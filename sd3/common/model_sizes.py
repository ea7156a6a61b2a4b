"""The dimensions of SD3 medium, SD3.5 medium and large, and of small models where those are not at hand or too slow.

`tiny` proves that code runs. `proportional` costs what SD3 medium at 1024x1024 costs, divided by 2000, when it paints
256x256 pixels: transformer, VAE and text encoders keep their share of the arithmetic and of the memory, so that what is
saved on it would be saved on SD3 medium. `proportional-1024` and `proportional-512` do the same for training, at
128x128 pixels: transformer, VAE encoder and text encoders keep the shares that they have when SD3 medium is trained at
1024x1024 and 512x512. tests/test_flops.py holds them to that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

LATENT_CHANNELS = 16
PATCH = 2
VAE_STRIDE = 8
CLIP_TOKENS = 77


@dataclass(frozen=True)
class Clip:
    """A CLIP text encoder with projection; `projection` is as wide as its pooled output."""

    width: int
    layers: int
    heads: int
    feed_forward: int
    projection: int


@dataclass(frozen=True)
class ModelSize:
    """Dimensions of all parts. `t5_rows` are the rows of T5's embedding, 0 for as many as its tokenizer has tokens."""

    clips: tuple[Clip, Clip]
    t5_width: int
    t5_feed_forward: int
    t5_layers: int
    t5_heads: int
    t5_head_width: int
    t5_rows: int
    vae_channels: tuple[int, int, int, int]
    vae_layers: int
    vae_groups: int
    layers: int
    heads: int
    head_width: int
    sample_size: int
    positions: int
    qk_norm: str | None = None  # SD3.5's normalization of queries and keys; SD3 medium has none
    dual_layers: tuple[int, ...] = ()  # blocks in which the image attends to itself once more, of SD3.5 medium

    @property
    def transformer_width(self) -> int:
        """Width of the transformer's hidden states."""
        return self.heads * self.head_width

    @property
    def pooled_width(self) -> int:
        """Width of the pooled prompt embeds: both projections side by side."""
        return sum(clip.projection for clip in self.clips)


SIZES = {
    # The CLIP widths are unlike each other, and unlike SD3's: nothing may tell the encoders by their width.
    "tiny": ModelSize(
        clips=(Clip(32, 2, 4, 64, 32), Clip(48, 2, 4, 96, 48)),
        t5_width=96, t5_feed_forward=128, t5_layers=2, t5_heads=4, t5_head_width=16, t5_rows=0,
        vae_channels=(8, 8, 16, 16), vae_layers=1, vae_groups=4,
        layers=2, heads=4, head_width=16, sample_size=16, positions=24,
    ),
    "proportional": ModelSize(
        clips=(Clip(64, 1, 4, 256, 64), Clip(96, 3, 4, 256, 96)),
        t5_width=192, t5_feed_forward=256, t5_layers=6, t5_heads=4, t5_head_width=48, t5_rows=86_000,
        vae_channels=(12, 24, 44, 44), vae_layers=2, vae_groups=4,
        layers=6, heads=4, head_width=48, sample_size=32, positions=48,
    ),
    "proportional-1024": ModelSize(
        clips=(Clip(64, 1, 4, 256, 64), Clip(96, 3, 4, 384, 96)),
        t5_width=512, t5_feed_forward=1152, t5_layers=1, t5_heads=8, t5_head_width=64, t5_rows=160_000,
        vae_channels=(32, 48, 96, 96), vae_layers=2, vae_groups=8,
        layers=4, heads=8, head_width=64, sample_size=16, positions=24,
    ),
    "proportional-512": ModelSize(
        clips=(Clip(128, 1, 4, 512, 128), Clip(192, 4, 4, 768, 192)),
        t5_width=512, t5_feed_forward=1024, t5_layers=5, t5_heads=8, t5_head_width=64, t5_rows=140_000,
        vae_channels=(32, 56, 96, 96), vae_layers=2, vae_groups=8,
        layers=4, heads=8, head_width=64, sample_size=16, positions=24,
    ),
    "sd3-medium": ModelSize(
        clips=(Clip(768, 12, 12, 3072, 768), Clip(1280, 32, 20, 5120, 1280)),
        t5_width=4096, t5_feed_forward=10240, t5_layers=24, t5_heads=64, t5_head_width=64, t5_rows=32_128,
        vae_channels=(128, 256, 512, 512), vae_layers=2, vae_groups=32,
        layers=24, heads=24, head_width=64, sample_size=128, positions=192,
    ),
    "sd3.5-medium": ModelSize(
        clips=(Clip(768, 12, 12, 3072, 768), Clip(1280, 32, 20, 5120, 1280)),
        t5_width=4096, t5_feed_forward=10240, t5_layers=24, t5_heads=64, t5_head_width=64, t5_rows=32_128,
        vae_channels=(128, 256, 512, 512), vae_layers=2, vae_groups=32,
        layers=24, heads=24, head_width=64, sample_size=128, positions=384, qk_norm="rms_norm",
        dual_layers=tuple(range(13)),
    ),
    "sd3.5-large": ModelSize(
        clips=(Clip(768, 12, 12, 3072, 768), Clip(1280, 32, 20, 5120, 1280)),
        t5_width=4096, t5_feed_forward=10240, t5_layers=24, t5_heads=64, t5_head_width=64, t5_rows=32_128,
        vae_channels=(128, 256, 512, 512), vae_layers=2, vae_groups=32,
        layers=38, heads=38, head_width=64, sample_size=128, positions=192, qk_norm="rms_norm",
    ),
}  # fmt: skip


def size_of(parts: Mapping[str, Path]) -> ModelSize:
    """The dimensions of a pipeline, from the configurations of its parts (`parts`: folder of each by its name)."""
    config = {
        name: json.loads((folder / "config.json").read_text(encoding="utf-8"))
        for name, folder in parts.items()
        if (folder / "config.json").is_file()
    }
    clips = [
        Clip(one["hidden_size"], one["num_hidden_layers"], one["num_attention_heads"], one["intermediate_size"],
             one["projection_dim"])
        for one in (config["text_encoder"], config["text_encoder_2"])
    ]  # fmt: skip
    t5, vae, transformer = config["text_encoder_3"], config["vae"], config["transformer"]
    return ModelSize(
        clips=(clips[0], clips[1]),
        t5_width=t5["d_model"], t5_feed_forward=t5["d_ff"], t5_layers=t5["num_layers"], t5_heads=t5["num_heads"],
        t5_head_width=t5["d_kv"], t5_rows=t5["vocab_size"],
        vae_channels=tuple(vae["block_out_channels"]), vae_layers=vae["layers_per_block"],
        vae_groups=vae["norm_num_groups"],
        layers=transformer["num_layers"], heads=transformer["num_attention_heads"],
        head_width=transformer["attention_head_dim"], sample_size=transformer["sample_size"],
        positions=transformer["pos_embed_max_size"], qk_norm=transformer.get("qk_norm"),
        dual_layers=tuple(transformer.get("dual_attention_layers") or ()),
    )  # fmt: skip
