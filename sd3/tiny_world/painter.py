"""Trains the transformer on an album, with the loss of the native engine."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from safetensors.torch import load_file

from sd3.common.model_parts import make_transformer
from sd3.native.step import Batch, Draws, FlowMatching
from sd3.tiny_world.album import Album
from sd3.tiny_world.loop import Trainer, seeded
from sd3.tiny_world.sizes import TINY_WORLD

STEPS = (4500, 6000)  # of each cycle; the second begins anew, with a rate of its own, from the average of the first
LEARNING_RATES = (1e-3, 8e-4)
BATCH = 64
# What FlowMatching asks of a training: SD3's own sampling of timesteps, no preconditioning (its paper, section 3.1).
_LOSS = argparse.Namespace(precondition_outputs=False, weighting_scheme="logit_normal", with_prior_preservation=False)


class WeightedKeys:
    """Joint attention of pictures and captions (Esser et al. 2024, arXiv:2403.03206, figure 2b) in which a key may
    stand for several: `attention_mask`, from the transformer's joint_attention_kwargs, is added to the scores."""

    def __call__(
        self, attn: Attention, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """New states of the picture [B, I, D] and of the caption [B, C, D]; `attention_mask` is [B, 1, 1, I + C]."""

        def heads(*pairs: tuple[torch.nn.Module, torch.nn.Module | None]) -> torch.Tensor:
            """Both inputs projected, normalized and joined [B, heads, I + C, head width]."""
            joined = []
            for states, (project, normalize) in zip((hidden_states, encoder_hidden_states), pairs, strict=True):
                split = project(states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
                joined.append(split if normalize is None else normalize(split))
            return torch.cat(joined, dim=2)

        mixed = torch.nn.functional.scaled_dot_product_attention(
            heads((attn.to_q, attn.norm_q), (attn.add_q_proj, attn.norm_added_q)),
            heads((attn.to_k, attn.norm_k), (attn.add_k_proj, attn.norm_added_k)),
            heads((attn.to_v, None), (attn.add_v_proj, None)),
            attn_mask=attention_mask,
        )
        picture, caption = mixed.transpose(1, 2).flatten(2).tensor_split([hidden_states.shape[1]], dim=1)
        return attn.to_out[0](picture), caption if attn.context_pre_only else attn.to_add_out(caption)


def fresh_transformer() -> SD3Transformer2DModel:
    """One whose blocks begin as the identity and whose prediction begins at nothing (adaLN-Zero: Peebles and Xie 2023,
    arXiv:2212.09748, section 3.2), which training is fastest from."""
    transformer = make_transformer(TINY_WORLD)
    zeroed = [transformer.proj_out, transformer.norm_out.linear]
    for block in transformer.transformer_blocks:
        zeroed += [block.norm1.linear, block.norm1_context.linear]
    for layer in zeroed:
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    return transformer


class Painter:
    """A transformer in training."""

    def __init__(
        self, album: Album, vae: AutoencoderKL, scheduler: FlowMatchEulerDiscreteScheduler, seed: int,
        cycle: int = 0, steps: int | None = None,
    ) -> None:  # fmt: skip
        """`vae` tells the shift and the scale of the album's latents; `steps`: of the cycle (default: its own)."""
        self.album, self._first_seed = album, seed * 1_000_003 + cycle * 100_003
        self.transformer = seeded(fresh_transformer, seed)
        self.transformer.set_attn_processor(WeightedKeys())
        self.trainer = Trainer(self.transformer, LEARNING_RATES[cycle], steps or STEPS[cycle])
        config = vae.config
        self._flow = FlowMatching(
            _LOSS, scheduler, config.shift_factor, config.scaling_factor, torch.float32, torch.device("cpu")
        )

    def loss_at(self, step: int) -> torch.Tensor:
        """The loss of the batch of a step; pictures, noise and timesteps follow from seed and step."""
        generator = torch.Generator().manual_seed(self._first_seed + step)
        chosen = torch.randint(len(self.album.latents), (BATCH,), generator=generator)
        latents, prompt, bias, pooled = (part[chosen].float() for part in self.album)
        noise = torch.randn(latents.shape, generator=generator)
        times = torch.sigmoid(torch.randn(BATCH, generator=generator))  # logit-normal with mean 0 and spread 1
        draws = Draws(torch.zeros(()), noise, (times * len(self._flow.timesteps)).long())
        pixels = (TINY_WORLD.sample_size // self.transformer.config.patch_size) ** 2
        keys = torch.nn.functional.pad(bias, (pixels, 0))[:, None, None]

        def predict(
            noisy: torch.Tensor, timesteps: torch.Tensor, prompt: torch.Tensor, pooled: torch.Tensor
        ) -> torch.Tensor:
            return self.transformer(
                hidden_states=noisy, timestep=timesteps, encoder_hidden_states=prompt, pooled_projections=pooled,
                joint_attention_kwargs={"attention_mask": keys}, return_dict=False,
            )[0]  # fmt: skip

        # No sampling around the means: their spread is far below the noise that is added.
        batch = Batch(latents, torch.zeros(()), (prompt, pooled), [])
        return self._flow.loss(predict, batch, draws)

    def begin_from(self, kept: Path) -> None:
        """Take the average of the weights of a cycle's checkpoint."""
        tensors = load_file(kept)
        average = {name: tensors[f"average.{name}"] for name in self.trainer.weights}
        self.transformer.load_state_dict(self.transformer.state_dict() | average)
        self.trainer.average |= {name: tensor.clone() for name, tensor in average.items()}

    def train(self, kept: Path, until: int | None = None) -> None:
        """Train to step `until` (default: the last), from the checkpoint `kept` where there is one."""
        if kept.exists():
            self.trainer.load(kept)
        self.trainer.run(self.loss_at, "painter", until, kept)
        self.trainer.save(kept)

    def save(self, folder: Path) -> None:
        """Write the moving average of the weights to `folder` in float16."""
        finished = make_transformer(TINY_WORLD)
        finished.set_attn_processor(JointAttnProcessor2_0())
        finished.load_state_dict(self.transformer.state_dict() | self.trainer.average)
        finished.half().save_pretrained(folder)
