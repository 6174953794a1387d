"""How fast this machine is at one model: a few timed calls on zeros."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from safediffusion.policies.latent import LatentPolicy

_QUICK = 0.2  # seconds that one timed call may take where it can be made smaller


@dataclass(frozen=True)
class Pace:
    """Seconds of one image on this machine, and the bytes that its graph keeps."""

    forward: float  # through the denoiser, one branch, no graph
    trained: float  # forward and backward
    decode: float  # as rollouts are decoded
    activations: int


def measure_pace(policy: LatentPolicy, batch: int) -> Pace:
    """Timed on zeros, `batch` images at once where that is quick and fewer where it is not."""
    # The wrapped network of several processes must not see a forward that its loop knows nothing of.
    policy = dataclasses.replace(policy, network=policy.unet)
    kept: dict[int, Tensor] = {}
    own = {weight.untyped_storage().data_ptr() for weight in policy.unet.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def inputs(count: int) -> tuple[Tensor, Tensor, Tensor]:
        latents = torch.zeros(count, *policy.sample_shape, device=policy.device)
        return latents, torch.full((), 500, device=policy.device), policy.encode.unconditional.expand(count, -1, -1)

    def train(count: int) -> None:
        output = policy.predict(*inputs(count))
        torch.autograd.grad(output.sum(), policy.parameters(), allow_unused=True)

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        warm = _timed(policy.device, lambda: policy.predict(*inputs(1)))
    held = sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own)
    kept.clear()
    with torch.no_grad():
        one = min(warm, _timed(policy.device, lambda: policy.predict(*inputs(1))))
        count = max(1, min(batch, int(_QUICK / one)))
        forward = _timed(policy.device, lambda: policy.predict(*inputs(count))) / count
        decode = _timed(policy.device, lambda: policy.sketch(inputs(count)[0])) / count
    some = max(1, count // 3)
    with torch.enable_grad():
        trained = _timed(policy.device, lambda: train(some)) / some
    return Pace(forward, trained, decode, held)


def _timed(device: torch.device, function: Callable[[], Any]) -> float:
    """Seconds of a call; of a quick one the least of three, because the first at a shape sets up kernels and memory."""
    seconds: list[float] = []
    while not seconds or (len(seconds) < 3 and max(seconds) < 1):
        began = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds)
