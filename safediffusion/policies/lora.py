"""Low-rank adapters on a diffusers network (arXiv 2106.09685), in the file format that diffusers loads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from safediffusion.errors import UserError
from safediffusion.policies.family import Family
from safediffusion.policies.pipeline import replaced


def add_lora(network: Any, rank: int, alpha: float, targets: Sequence[str]) -> None:
    """Adapters on each layer whose name ends in one of `targets`; at first they add exactly zero."""
    from peft import LoraConfig

    names = [f".{name}" for name, _ in network.named_modules()]
    for target in targets:  # peft minds only when none of them is found
        if not any(name.endswith(f".{target}") for name in names):
            raise UserError(f"lora_targets: no layer of the denoiser is called {target!r}")
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same adapters in every process, and the caller's generator is left alone
        try:
            network.add_adapter(config)
        except ValueError as error:
            raise UserError(f"lora_targets {list(targets)} are not all linear or convolution layers") from error


def merge_lora(network: Any) -> None:
    """Add the adapters into the weights they sit on, and remove them."""
    network.fuse_lora()
    network.unload_lora()


def save_lora(network: Any, family: Family, folder: Path) -> None:
    """Write pytorch_lora_weights.safetensors, which takes `load_lora_weights(folder)` of the family's pipeline."""
    from diffusers import loaders
    from peft import get_peft_model_state_dict

    given = {
        f"{family.network}_lora_layers": get_peft_model_state_dict(network),
        f"{family.network}_lora_adapter_metadata": network.peft_config["default"].to_dict(),  # holds alpha, which the tensors do not
    }
    with replaced(folder) as new:
        getattr(loaders, family.lora_mixin).save_lora_weights(new, **given)
