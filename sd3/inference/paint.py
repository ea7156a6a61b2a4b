"""From recipes to pixels: each distinct prompt encoded once, the encoders let go, latents denoised in batches.

Whatever could make a picture depend on its neighbours is done picture by picture: the noise comes from a generator of
its own, prompts are encoded and latents are decoded one at a time. Only the transformer sees a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from diffusers import StableDiffusion3Img2ImgPipeline, StableDiffusion3Pipeline
from diffusers.utils.torch_utils import randn_tensor
from torch.nn.functional import pad

from sd3.common.command_line import UserError
from sd3.common.device_errors import told_of_compiler
from sd3.common.part_loading import tokens_without_t5
from sd3.common.trained_length import DEFAULT
from sd3.inference.weights import Weights, release, told_of_memory

if TYPE_CHECKING:
    from PIL import Image

    from sd3.common.pictures import Recipe

T5_TOKENS = DEFAULT  # what T5 reads of a prompt unless something else is asked for


class Embeds(NamedTuple):
    """A prompt as the transformer reads it.

    `prompt` (1, 77 + tokens that T5 reads, width of T5), `pooled` (1, sum of CLIP widths). Without T5 as many zeros as
    StableDiffusion3Pipeline takes stand in for its part of `prompt`.
    """

    prompt: torch.Tensor
    pooled: torch.Tensor


@torch.no_grad()
def encode_prompts(
    weights: Weights, texts: Iterable[str], device: torch.device, t5_tokens: int = T5_TOKENS
) -> dict[str, Embeds]:
    """Embeds of each distinct text, in host memory; the same as StableDiffusion3Pipeline.encode_prompt makes.

    T5 reads `t5_tokens` of a text.
    One encoder is on the device at a time: T5 alone is larger than all the rest of SD3 medium.
    """
    texts = list(dict.fromkeys(texts))
    hidden: dict[str, list[torch.Tensor]] = {text: [] for text in texts}
    pooled: dict[str, list[torch.Tensor]] = {text: [] for text in texts}
    for part in weights.encoders():
        with told_of_memory(device.type, f"{part} alone does not fit; use --dtype=float16, another device or the cpu"):
            for text, (sequence, pool) in zip(texts, _encoded(weights, part, texts, device, t5_tokens), strict=True):
                hidden[text].append(sequence)
                pooled[text] += [] if pool is None else [pool]
        release(device.type)
    embeds = {}
    for text in texts:
        if "text_encoder_3" not in weights.encoders():
            hidden[text].append(_zeros_for_t5(weights, hidden[text], t5_tokens))
        *clip, t5 = hidden[text]
        joint = torch.cat(clip, dim=-1)
        joint = pad(joint, (0, t5.shape[-1] - joint.shape[-1]))
        embeds[text] = Embeds(torch.cat([joint, t5], dim=-2), torch.cat(pooled[text], dim=-1))
    return embeds


def _encoded(
    weights: Weights, part: str, texts: Sequence[str], device: torch.device, t5_tokens: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """One encoder's output for each text, in host memory: a sequence (1, tokens, width); CLIP's pooled one too."""
    tokenizer, encoder = weights.text_encoder(part, device)
    is_t5 = part == "text_encoder_3"
    length = t5_tokens if is_t5 else tokenizer.model_max_length
    for text in texts:
        tokens = tokenizer(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        output = encoder(tokens.input_ids.to(device), output_hidden_states=not is_t5)
        if is_t5:
            yield output.last_hidden_state.to("cpu", weights.dtype), None
        else:
            # CLIP's last layer is trained for its pooled output alone; SD3 reads the one before it.
            yield output.hidden_states[-2].to("cpu", weights.dtype), output.text_embeds.to("cpu", weights.dtype)


def _zeros_for_t5(weights: Weights, clip: Sequence[torch.Tensor], t5_tokens: int) -> torch.Tensor:
    """What StableDiffusion3Pipeline takes for T5's output where a model has none (1, tokens, width of the embeds)."""
    return torch.zeros(1, tokens_without_t5(t5_tokens, clip[0].shape[1]), weights.prompt_width(), dtype=weights.dtype)


class Painter:
    """Transformer and autoencoder on the device, ready to paint batches of pictures that share their settings."""

    def __init__(
        self, weights: Weights, device: torch.device, start: Image.Image | None = None, offload: str = "",
        compiled: bool = False, tiling: bool = False,
    ) -> None:  # fmt: skip
        """Load the weights.

        Args:
            start: the picture to start from, of the recipes' size; None for text to image.
            offload: "" (all on the device), "model" or "layers": what accelerate's hooks move there when needed.
        """
        self.device = device
        self.dtype = weights.dtype
        none = dict.fromkeys(("text_encoder", "text_encoder_2", "text_encoder_3"))
        none |= dict.fromkeys(("tokenizer", "tokenizer_2", "tokenizer_3"))
        kind = StableDiffusion3Pipeline if start is None else StableDiffusion3Img2ImgPipeline
        self.pipeline = kind(
            transformer=weights.transformer(), vae=weights.vae(), scheduler=weights.scheduler(), **none
        )
        self.pipeline.set_progress_bar_config(disable=True)
        with told_of_memory(device.type, "give --offload, or --offload=layers where that is not enough"):
            if offload == "model":
                self.pipeline.enable_model_cpu_offload(device=device)
            elif offload == "layers":
                self.pipeline.enable_sequential_cpu_offload(device=device)
            else:
                self.pipeline.to(device)
        if tiling:
            self.pipeline.vae.enable_tiling()
        if compiled:
            self.pipeline.transformer.compile()
        self._start = None if start is None else self.pipeline.image_processor.preprocess(start)
        self._posterior = None

    @torch.no_grad()
    def paint(
        self, recipes: Sequence[Recipe], embeds: dict[str, Embeds], on_step: Callable[[int], object] = int
    ) -> list[Image.Image]:
        """The pictures of `recipes`, which may differ in prompt and seed alone; `on_step` is told at each step how many
        pictures made it.

        Raises:
            UserError: the arithmetic left the range of the dtype, or the device's memory is too small.
        """
        advice = f"lower --batch-size={len(recipes)}, or give --vae-tiling=on or --offload"
        with told_of_compiler("--compile"), told_of_memory(self.device.type, advice):
            latents = self._denoise(recipes, embeds, on_step)
            return [self._decode(latents[i : i + 1], recipe) for i, recipe in enumerate(recipes)]

    def _denoise(
        self, recipes: Sequence[Recipe], embeds: dict[str, Embeds], on_step: Callable[[int], object]
    ) -> torch.Tensor:
        """Latents (batch, channels, height / 8, width / 8)."""
        first = recipes[0]
        guided = first.guidance_scale > 1
        arguments = self._batch_of([embeds[recipe.prompt] for recipe in recipes], "")
        if guided:
            arguments |= self._batch_of([embeds[recipe.negative_prompt] for recipe in recipes], "negative_")
        latents = torch.cat([self._first_latents(recipe) for recipe in recipes])
        if self._start is not None:
            arguments |= {"image": self._start, "strength": first.strength}

        def step_done(pipeline: object, step: int, timestep: object, values: dict[str, object]) -> dict[str, object]:
            on_step(len(recipes))
            return {}

        return self.pipeline(
            **arguments, latents=latents, height=first.height, width=first.width, num_inference_steps=first.steps,
            guidance_scale=first.guidance_scale, output_type="latent", callback_on_step_end=step_done,
        ).images  # fmt: skip

    def _batch_of(self, embeds: Sequence[Embeds], prefix: str) -> dict[str, torch.Tensor]:
        return {
            f"{prefix}prompt_embeds": torch.cat([one.prompt for one in embeds]).to(self.device),
            f"{prefix}pooled_prompt_embeds": torch.cat([one.pooled for one in embeds]).to(self.device),
        }

    def _first_latents(self, recipe: Recipe) -> torch.Tensor:
        """What denoising begins with (1, channels, height / 8, width / 8): the numbers the library itself would draw
        from a CPU generator with this seed, whatever the device."""
        generator = torch.Generator("cpu").manual_seed(recipe.seed)
        pipeline, scheduler = self.pipeline, self.pipeline.scheduler
        shape = (
            1,
            pipeline.transformer.config.in_channels,
            recipe.height // pipeline.vae_scale_factor,
            recipe.width // pipeline.vae_scale_factor,
        )
        if self._start is None:
            return randn_tensor(shape, generator=generator, device=self.device, dtype=self.dtype)
        if self._posterior is None:
            pixels = self._start.to(self.device, self.dtype)
            self._posterior = pipeline.vae.encode(pixels).latent_dist
        config = pipeline.vae.config
        clean = (self._posterior.sample(generator) - config.shift_factor) * config.scaling_factor
        noise = randn_tensor(shape, generator=generator, device=self.device, dtype=self.dtype)
        scheduler.set_timesteps(recipe.steps, device=self.device)
        timesteps, _ = pipeline.get_timesteps(recipe.steps, recipe.strength, self.device)
        return scheduler.scale_noise(clean, timesteps[:1], noise).to(self.dtype)

    def _decode(self, latents: torch.Tensor, recipe: Recipe) -> Image.Image:
        vae = self.pipeline.vae
        pixels = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]
        if not torch.isfinite(pixels).all():
            raise UserError(
                f"the picture of {recipe.prompt!r} with seed {recipe.seed} left the range of {recipe.dtype}; "
                "use --dtype=bfloat16 or --dtype=float32."
            )
        return self.pipeline.image_processor.postprocess(pixels, output_type="pil")[0]
