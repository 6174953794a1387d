"""Low-rank adapters on a diffusers UNet (arXiv 2106.09685), in the file format that diffusers loads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from safediffusion.errors import UserError
from safediffusion.policies.pipeline import replaced


def add_lora(unet: Any, rank: int, alpha: float, targets: Sequence[str]) -> None:
    """Adapters on each layer whose name ends in one of `targets`; at first they add exactly zero."""
    from peft import LoraConfig

    names = [f".{name}" for name, _ in unet.named_modules()]
    for target in targets:  # peft minds only when none of them is found
        if not any(name.endswith(f".{target}") for name in names):
            raise UserError(f"lora_targets: no layer of the UNet is called {target!r}")
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same adapters in every process, and the caller's generator is left alone
        try:
            unet.add_adapter(config)
        except ValueError as error:
            raise UserError(f"lora_targets {list(targets)} are not all linear or convolution layers") from error


def merge_lora(unet: Any) -> None:
    """Add the adapters into the weights they sit on, and remove them."""
    unet.fuse_lora()
    unet.unload_lora()


def save_lora(unet: Any, folder: Path) -> None:
    """Write pytorch_lora_weights.safetensors, which takes `StableDiffusionPipeline.load_lora_weights(folder)`."""
    from diffusers.loaders import StableDiffusionLoraLoaderMixin
    from peft import get_peft_model_state_dict

    with replaced(folder) as new:
        StableDiffusionLoraLoaderMixin.save_lora_weights(
            new,
            unet_lora_layers=get_peft_model_state_dict(unet),
            unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),  # holds alpha, which the tensors do not
        )
