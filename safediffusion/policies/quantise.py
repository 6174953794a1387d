"""A frozen base in 8 or 4 bits: a half or a quarter of the memory of bfloat16, for adapters alone."""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

import torch

from safediffusion.errors import UserError

Quantised = Literal["none", "int8", "nf4"]
BITS = {"int8": 8.0, "nf4": 4.127}  # of a weight, its share of the scales included
_PACKAGES = {"int8": "torchao", "nf4": "bitsandbytes"}


def check_trained(kind: Quantised, train: str) -> None:
    """Raises UserError where there is no frozen weight to quantise."""
    if kind != "none" and train == "full":
        raise UserError(f'policy.quantise = "{kind}" keeps frozen weights in few bits, and policy.train = "full" freezes none; train "lora", or leave it out')


def check_installed(kind: Quantised) -> None:
    """Raises UserError where the package that quantises is missing."""
    package = _PACKAGES.get(kind)
    if package and importlib.util.find_spec(package) is None:
        raise UserError(f'policy.quantise = "{kind}" needs {package}, which is not installed; run: pip install "safediffusion[quantise]"')


def quantise(network: torch.nn.Module, kind: Quantised) -> None:
    """Turn the frozen linear layers of `network` into such ones, those under its adapters too; in place, on the CPU. "none" changes nothing.

    Only weights are rounded, not what comes in: a picture does not depend on those beside it, and half-precision overflows nowhere.
    "int8": each row of weights has a scale. "nf4": 16 levels that are even in the quantiles of a Gaussian, a scale for each 64
    weights, the scales quantised too (QLoRA, arXiv 2305.14314, section 3); the rounding is done when the layer moves to its device.
    """
    if kind == "int8":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(network, Int8WeightOnlyConfig(), filter_fn=lambda layer, _: _frozen(layer))
    if kind != "nf4":
        return
    for name, layer in [(name, layer) for name, layer in network.named_modules() if _frozen(layer)]:
        network.set_submodule(name, _nf4(layer))


def _frozen(layer: torch.nn.Module) -> bool:
    return type(layer) is torch.nn.Linear and not layer.weight.requires_grad


def _nf4(layer: Any) -> Any:
    from bitsandbytes.nn import Linear4bit, Params4bit

    made = Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=layer.weight.dtype, quant_type="nf4", device="meta")
    made.weight, made.bias = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=made), layer.bias
    # It stays in training mode: otherwise bitsandbytes has another kernel without a gradient on some CPUs, and what is sampled would not be what is trained.
    return made.requires_grad_(False)
