"""The frozen autoencoder between latents and pictures, and the tiny one that may decode in its place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from safediffusion.errors import UserError


def cell(vae: Any) -> int:
    """Pixels of a side of a latent cell."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def placed(vae: Any, dtype: str, device: torch.device, tile: int | None = None) -> Any:
    """On its device, in "float32" or "bfloat16"; with `tile` it decodes one picture at a time, in tiles of so many pixels."""
    vae = vae.to(device)
    if tile is not None:
        cut(vae, tile)
    return vae if dtype == "float32" else vae.to(dtype=torch.bfloat16)  # to float32, which it is, diffusers would warn


def cut(vae: Any, tile: int) -> None:
    """From now on it decodes one picture at a time, in tiles of so many pixels. Raises UserError for a side that is no whole number of latent cells."""
    if tile % cell(vae):
        raise UserError(f"policy.vae_tile = {tile} is not a multiple of {cell(vae)}, the pixels per latent cell")
    vae.enable_slicing()
    vae.enable_tiling()
    vae.tile_sample_min_size, vae.tile_latent_min_size = tile, tile // cell(vae)


def decoded(vae: Any, x: Tensor) -> Tensor:
    """Images `(B, 3, H, W)` in [0, 1], float32, of the clean latents `x`; differentiable."""
    scaled = x / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    images: Tensor = vae.decode(scaled.to(vae.dtype), return_dict=False)[0].float()
    return (images / 2 + 0.5).clamp(0, 1)


def encoded(vae: Any, images: Tensor) -> Tensor:
    """Clean latents `(B, C, h, w)`, float32: the mean of the posterior, in the scale the denoiser knows."""
    mean: Tensor = vae.encode((images * 2 - 1).to(vae.dtype)).latent_dist.mean.float()
    return (mean - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def check_tiny(name: str, tiny: Any, vae: Any) -> None:
    """Raises UserError unless the tiny autoencoder called `name` decodes latents of the same shape to pictures of the same size."""
    channels, pixels = tiny.config.latent_channels, 2 ** (len(tiny.config.decoder_block_out_channels) - 1)
    wanted, side = vae.config.latent_channels, cell(vae)
    if (channels, pixels) != (wanted, side):
        raise UserError(f"policy.tiny_vae: {name} decodes {channels} channels to {pixels} pixels per latent cell; the model's latents have {wanted}, and {side} pixels")
