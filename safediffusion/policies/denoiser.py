"""The denoiser of a folder as a policy runs it: what of it learns, in which precision and layout, on which device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from safediffusion import ranks
from safediffusion.policies.family import Family
from safediffusion.policies.lora import add_lora
from safediffusion.policies.pipeline import load_denoiser
from safediffusion.policies.quantise import quantise
from safediffusion.policies.settings import PolicySettings
from safediffusion.policies.shard import shard, shared_mesh

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def placed_denoiser(family: Family, folder: Path, settings: PolicySettings, device: torch.device, change: Callable[[Any], None] | None = None) -> Any:
    """The denoiser that a policy runs, on its device. `change` is done to it, in place, while it is exact: before it is rounded, quantised or divided."""
    mesh = shared_mesh(settings, device)

    def made() -> Any:
        denoiser = trainable(family, folder, settings)
        if change is not None:
            change(denoiser)
        if settings.gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
        return placed(denoiser, settings, device, mesh)

    denoiser = made() if mesh is None else ranks.in_turn(made)  # a large one is read onto the CPU whole
    if settings.compile:
        denoiser.compile(dynamic=False)  # in place: names of weights, adapters and what is saved stay as they are
    return denoiser


def trainable(family: Family, folder: Path, settings: PolicySettings) -> Any:
    """The denoiser of the folder, with all its weights, its fresh adapters or nothing to be trained; float32, on the CPU."""
    denoiser = load_denoiser(family, folder)
    if settings.train == "lora":
        add_lora(denoiser, settings.lora_rank, settings.lora_alpha or settings.lora_rank, settings.lora_targets or family.lora_targets)
    return denoiser.requires_grad_(True) if settings.train == "full" else denoiser


def placed(denoiser: Any, settings: PolicySettings, device: torch.device, mesh: DeviceMesh | None = None) -> Any:
    """The denoiser on its device, in the layout and precision in which it runs fastest there with the same result.

    Frozen linear and convolution layers are kept in the precision that autocast would round them to at each call; norms
    stay float32, as autocast runs them in it, so that policy and reference agree to the last bit. torch's RMSNorm (FLUX), which
    autocast leaves alone, is slow where its weight is not in the precision of its input; where it is not trained it can be.
    On a `mesh` it is sharded, in the ordinary layout, as FSDP2 knows no other.
    """
    rounded = (torch.nn.Linear, torch.nn.Conv2d, *([] if settings.train == "full" else [torch.nn.RMSNorm]))
    for module in denoiser.modules():
        if isinstance(module, rounded) and not any(weight.requires_grad for weight in module.parameters(recurse=False)):
            module.to(dtype=getattr(torch, settings.dtype))
    quantise(denoiser, settings.quantise)
    if mesh is not None:
        shard(denoiser, mesh, device)
        return denoiser
    return denoiser.to(device, memory_format=torch.channels_last)
