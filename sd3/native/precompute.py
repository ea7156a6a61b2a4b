"""What never changes in a run is computed once, before it: each picture's latent distribution, each caption's embeds.

The results go to a cache that later runs and all ranks share; VAE and text encoders are loaded only where something is
missing, and leave the device before training starts.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers import AutoencoderKL
from tqdm.auto import tqdm

from sd3.common.command_line import UserError
from sd3.common.memory import uncollected
from sd3.common.model_files import content_hash, has_t5, parts_of
from sd3.common.model_sizes import CLIP_TOKENS, VAE_STRIDE
from sd3.common.package_versions import package_versions
from sd3.common.part_loading import joint_attention_dim, load_weights
from sd3.native.cache import Cache, Shapes, Tensors, compute_missing
from sd3.native.pictures import Squares, View, identities
from sd3.native.text import ENCODERS, TOKENIZERS, TextEncoders, Tokenizers, load_encoders

logger = logging.getLogger(__name__)
PICTURES_A_BATCH = 4  # of the VAE, whose activations are large
CAPTIONS_A_BATCH = 8
# The libraries that latents and embeds are computed with: between two versions, entries differ in their last bits.
LATENT_LIBRARIES = ("torch", "torchvision", "pillow", "diffusers")
PROMPT_LIBRARIES = ("torch", "transformers", "tokenizers", "ftfy")
VAE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# What bfloat16 training does to the latents anyway: rounding to 8 bits, relative to their root mean square.
NEGLIGIBLE = 2.0**-9


class Precompute:
    """Fills the cache for a run; every rank calls the same methods."""

    def __init__(self, options: argparse.Namespace, model: Path, accelerator: Accelerator) -> None:
        """`model`: the pipeline directory."""
        self.options = options
        self.model = model
        self.accelerator = accelerator
        self.cache = Cache(Path(options.precompute_dir))
        if accelerator.is_main_process:
            self.cache.sweep()

    def latents(self, views: Sequence[View]) -> list[str]:
        """For each view the key of its latent distribution: `mean` and `logvar` [16, H/8, W/8] float32.

        They are as the VAE gives them, not yet shifted and scaled.
        """
        with uncollected():
            known = identities(views, self.cache.seen)
            names = [view.key(self.options.resolution, *known[view.content]) for view in views]
            distinct = dict(zip(names, views, strict=True))  # the same square is encoded once
            to_encode = list(distinct.values())
        vae_facts = {
            "vae": content_hash([self.model / "vae"]), "variant": self.options.variant,
            "libraries": package_versions(LATENT_LIBRARIES),
        }  # fmt: skip
        tried = Cache.key(what="vae in float16 1", views=list(distinct)[:PICTURES_A_BATCH], **vae_facts)
        dtype = self._vae_dtype(tried, to_encode)
        keys = {name: Cache.key(what="latents 3", view=name, dtype=str(dtype), **vae_facts) for name in distinct}
        vae: AutoencoderKL | None = None
        squares = Squares(to_encode, self.options.resolution)

        def compute(places: list[int]) -> list[Tensors]:
            nonlocal vae
            if vae is None:
                vae = self._load_vae(dtype)
            mean, logvar = encode(vae, squares.take(len(places)))
            self._check_finite(mean, logvar, [to_encode[place] for place in places], dtype)
            return [{"mean": mean[i], "logvar": logvar[i]} for i in range(len(places))]

        with contextlib.closing(squares):
            self._fill(
                "Encoding pictures", list(keys.values()), self._latent_shapes(), compute, PICTURES_A_BATCH,
                squares.announce,
            )  # fmt: skip
        return [keys[name] for name in names]

    def _vae_dtype(self, tried: str, views: Sequence[View]) -> torch.dtype:
        """What was asked for; where that is `auto`, float16 if it is found to be good enough, tried on the first views.

        The main rank finds out for all, once: the cache keeps the error under the key `tried`.
        """
        asked = self.options.vae_precision
        if asked != "auto":
            return VAE_DTYPES[asked]
        if self.accelerator.device.type == "cpu":  # where half precision gains nothing
            return torch.float32
        chosen: torch.dtype | None = None
        if self.accelerator.is_main_process:
            if not self.cache.holds(tried, {"error": ()}):
                error = error_in_half(self._load_vae(torch.float32), self._pixels(views[:PICTURES_A_BATCH]))
                self.cache.write(tried, {"error": error})
            chosen = half_if_negligible(self.cache.read(tried)["error"].item())
        return broadcast_object_list([chosen])[0]

    def _check_finite(
        self, mean: torch.Tensor, logvar: torch.Tensor, views: Sequence[View], dtype: torch.dtype
    ) -> None:
        finite = (mean.isfinite() & logvar.isfinite()).flatten(1).all(1).tolist()
        if not all(finite):
            name, precision = views[finite.index(False)].name, str(dtype).removeprefix("torch.")
            advice = "look at it" if dtype == torch.float32 else "give --vae_precision=fp32"
            raise UserError(f"The VAE in {precision} makes no numbers of {name}; {advice}.")

    def _pixels(self, views: Sequence[View]) -> torch.Tensor:
        return torch.stack([view.pixels(self.options.resolution) for view in views])

    def _load_vae(self, dtype: torch.dtype) -> AutoencoderKL:
        vae = load_weights(AutoencoderKL, self.model / "vae", self.options.variant, torch_dtype=dtype)
        return vae.requires_grad_(False).eval().to(
            self.accelerator.device, memory_format=convolution_format(self.accelerator.device.type)
        )

    def prompts(self, captions: Sequence[str], dtype: torch.dtype, t5_tokens: int) -> list[str]:
        """Keys of the captions' embeds: `prompt` [77 + t5_tokens, D] and `pooled` [P], of the encoders in `dtype`."""
        there = parts_of(self.model)
        parts = content_hash(self.model / name for name in (*ENCODERS, *TOKENIZERS) if name in there)
        # The zeros that stand for T5's output are as wide as the transformer wants them.
        width = {} if has_t5(self.model) else {"width": joint_attention_dim(self.model / "transformer")}
        libraries = package_versions(PROMPT_LIBRARIES)
        tokenizers = Tokenizers(self.model, t5_tokens)
        t5_tokens = tokenizers.t5_tokens
        keys = [
            Cache.key(
                what="prompt 2", caption=caption, t5_tokens=t5_tokens, parts=parts, variant=self.options.variant,
                dtype=str(dtype), libraries=libraries, **width,
            )
            for caption in captions
        ]
        encoders: TextEncoders | None = None

        @torch.no_grad()
        def compute(places: list[int]) -> list[Tensors]:
            nonlocal encoders
            if encoders is None:
                encoders = load_encoders(self.model, self.options.variant, dtype).to(self.accelerator.device)
            tokens = tokenizers([captions[place] for place in places])
            prompt, pooled = encoders([ids.to(self.accelerator.device) for ids in tokens])
            return [{"prompt": prompt[i].to(dtype), "pooled": pooled[i].to(dtype)} for i in range(len(places))]

        shapes: Shapes = {"prompt": (CLIP_TOKENS + t5_tokens, None), "pooled": (None,)}
        self._fill("Encoding captions", keys, shapes, compute, CAPTIONS_A_BATCH)
        return keys

    def _latent_shapes(self) -> Shapes:
        side = self.options.resolution // VAE_STRIDE
        return dict.fromkeys(("mean", "logvar"), (None, side, side))

    def _fill(
        self, what: str, keys: Sequence[str], shapes: Shapes, compute: Callable[[list[int]], list[Tensors]],
        chunk_size: int, announce: Callable[[list[int]], object] = lambda _: None,
    ) -> None:  # fmt: skip
        """Compute this rank's share of what is missing, and wait for the other ranks'."""
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        share = sum(place // chunk_size % ranks == rank for place in range(len(keys)))
        with tqdm(total=share, desc=what, disable=not self.accelerator.is_local_main_process, leave=False) as bar:
            written = compute_missing(
                self.cache, keys, shapes, compute, chunk_size, lambda chunk: chunk % ranks == rank, bar.update,
                announce,
            )  # fmt: skip
        logger.info("%s: %d of %d computed by this rank.", what, written, len(keys))
        self.accelerator.wait_for_everyone()


def convolution_format(device: str) -> torch.memory_format:
    """Memory format of the VAE's convolutions: channels last where they are faster so.

    torch_npu accepts only contiguous and preserve_format (its `Module.to` and `Tensor.to` raise otherwise).
    """
    return torch.preserve_format if device == "npu" else torch.channels_last


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log-variance [B, 16, H/8, W/8], float32, of pixels [B, 3, H, W] from -1 to 1."""
    pixels = pixels.to(vae.device, vae.dtype, memory_format=convolution_format(vae.device.type))
    distribution = vae.encode(pixels).latent_dist
    return distribution.mean.float(), distribution.logvar.float()


def error_in_half(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """How far the means of `vae` in float16 are from those in float32, relative to their root mean square.

    A scalar, the largest there is where they are no numbers.
    """
    exact, _ = encode(vae, pixels)
    half, _ = encode(copy.deepcopy(vae).to(dtype=torch.float16), pixels)
    error = (half - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    return error.nan_to_num(nan=torch.finfo(error.dtype).max)


def half_if_negligible(error: float) -> torch.dtype:
    """float16 where that is what half precision does to the means and no more than NEGLIGIBLE."""
    dtype = torch.float16 if error <= NEGLIGIBLE else torch.float32
    logger.info(
        "VAE in float16: relative error %.1e, limit %.1e; pictures are encoded in %s.", error, NEGLIGIBLE, dtype
    )
    return dtype
