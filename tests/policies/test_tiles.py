"""Pictures decoded in tiles, one at a time: as diffusers does it, whole where they are small, and with a gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from safediffusion.errors import UserError
from safediffusion.policies.latent import PolicySettings, load_policy


def test_tiles_are_those_of_diffusers(tiny_pipeline: Path) -> None:
    policy, whole = (load_policy(tiny_pipeline, PolicySettings(vae_tile=tile)) for tile in (64, None))
    latents = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(0))  # 128 pixels
    decoded: list[Any] = []
    policy.vae.decoder.register_forward_hook(lambda module, inputs, output: decoded.append(tuple(output.shape)))
    images = policy.decode(latents.requires_grad_())
    assert images.shape == (2, 3, 128, 128)
    assert max(shape[0] * shape[2] * shape[3] for shape in decoded) == 64 * 64
    # Next to no border a tile sees what it would see in the whole picture, but for the statistics of its norms.
    assert (images - whole.decode(latents)).abs().mean() < 0.1
    images.sum().backward()
    assert (latents.grad.abs().sum((1, 2, 3)) > 0).all()


def test_small_pictures_are_decoded_whole(tiny_pipeline: Path) -> None:
    policy, whole = (load_policy(tiny_pipeline, PolicySettings(vae_tile=tile)) for tile in (64, None))
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(policy.decode(latents), torch.cat([whole.decode(each[None]) for each in latents]))


def test_a_tile_is_whole_cells(tiny_pipeline: Path) -> None:
    with pytest.raises(UserError, match="vae_tile = 66 is not a multiple of 4, the pixels per latent cell"):
        load_policy(tiny_pipeline, PolicySettings(vae_tile=66))
