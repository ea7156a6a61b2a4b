"""The parts of an SD3 pipeline at a given size, with fresh weights; on torch's meta device they cost nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffusers import AutoencoderKL, SD3Transformer2DModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from sd3.common.model_sizes import LATENT_CHANNELS, PATCH

if TYPE_CHECKING:
    from sd3.common.model_sizes import Clip, ModelSize

PUBLISHED_CLIP_ROWS = 49_408


def make_clip(clip: Clip, rows: int = PUBLISHED_CLIP_ROWS) -> CLIPTextModelWithProjection:
    """A CLIP text encoder for a vocabulary of `rows` tokens, the last two of which begin and end a text."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=rows, hidden_size=clip.width, projection_dim=clip.projection,
            intermediate_size=clip.feed_forward, num_hidden_layers=clip.layers, num_attention_heads=clip.heads,
            bos_token_id=rows - 2, eos_token_id=rows - 1, pad_token_id=rows - 1,
        )
    )  # fmt: skip


def make_t5(size: ModelSize, rows: int = 0) -> T5EncoderModel:
    """A T5 encoder for a vocabulary of `rows` tokens, or of the size's own number."""
    return T5EncoderModel(
        T5Config(
            vocab_size=size.t5_rows or rows, d_model=size.t5_width, d_kv=size.t5_head_width, d_ff=size.t5_feed_forward,
            num_layers=size.t5_layers, num_heads=size.t5_heads, feed_forward_proj="gated-gelu",
            is_encoder_decoder=False, use_cache=False,
        )
    )  # fmt: skip


def make_vae(size: ModelSize) -> AutoencoderKL:
    """An autoencoder of stride 8 with SD3's scaling and shift factors."""
    return AutoencoderKL(
        in_channels=3, out_channels=3, down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4, block_out_channels=list(size.vae_channels),
        layers_per_block=size.vae_layers, latent_channels=LATENT_CHANNELS, norm_num_groups=size.vae_groups,
        sample_size=64, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip


def make_transformer(size: ModelSize) -> SD3Transformer2DModel:
    """An MMDiT as of SD3 medium, SD3.5 medium or SD3.5 large."""
    return SD3Transformer2DModel(
        sample_size=size.sample_size, patch_size=PATCH, in_channels=LATENT_CHANNELS, num_layers=size.layers,
        attention_head_dim=size.head_width, num_attention_heads=size.heads, joint_attention_dim=size.t5_width,
        caption_projection_dim=size.transformer_width, pooled_projection_dim=size.pooled_width,
        out_channels=LATENT_CHANNELS, pos_embed_max_size=size.positions, qk_norm=size.qk_norm,
        dual_attention_layers=size.dual_layers,
    )  # fmt: skip
