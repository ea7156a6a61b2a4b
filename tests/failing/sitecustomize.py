"""Put on PYTHONPATH by a test: with SD3_TEST_FAIL set, the autoencoder of this process paints what is no number."""

import os

if os.environ.get("SD3_TEST_FAIL"):
    import torch
    from diffusers import AutoencoderKL

    def decode(self, latents, *_, **__):
        return (torch.full((1, 3, 8 * latents.shape[-2], 8 * latents.shape[-1]), float("nan")),)

    AutoencoderKL.decode = decode
