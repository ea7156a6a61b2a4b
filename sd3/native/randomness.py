"""Random numbers that belong to a place in the run, not to what was drawn before.

Everything random about one training sample (its noise, timestep, flip, the VAE's sampling noise) comes from a seed made
of the run's seed and the sample's position in the run. So a resumed run needs no saved random state, and the draws are
the same however the samples are dealt out to ranks.
"""

from __future__ import annotations

import hashlib
import secrets

import torch


def seed_of(seed: int, purpose: str, position: int) -> int:
    """A seed from 0 to 2**63 - 1 for `purpose` at `position`; different arguments give unrelated seeds."""
    digest = hashlib.blake2b(f"{seed} {purpose} {position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def fresh_seed() -> int:
    """A seed for a run that was given none."""
    return secrets.randbits(32)


def seed_everything(seed: int) -> None:
    """Seed torch's global generators of all devices, which dropout draws from."""
    torch.manual_seed(seed)


def normal(shape: tuple[int, ...], seeds: list[int], device: torch.device) -> torch.Tensor:
    """Standard normal float32 noise [len(seeds), *shape] on `device`, each row from its own seed."""
    noise = torch.empty((len(seeds), *shape), device=device)
    generator = torch.Generator(device=device)
    for row, seed in zip(noise, seeds, strict=True):
        row.normal_(generator=generator.manual_seed(seed))
    return noise
