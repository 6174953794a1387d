"""How fast this machine is at one model: a few timed calls on zeros."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from safediffusion import ranks
from safediffusion.policies.latent import LatentPolicy
from safediffusion.types import Process

_QUICK = 0.2  # seconds of a call past which no larger one is tried
_SLOW = 2.0  # no call is made longer than one of so many seconds asks for


@dataclass(frozen=True)
class Pace:
    """Seconds of one image on this machine, and the bytes that its graph keeps."""

    forward: float  # through the denoiser, one branch, no graph
    trained: float  # forward and backward
    decode: float  # as rollouts are decoded
    activations: int
    painting: int  # bytes that the graph of its decoded picture keeps; 0 where nobody asked


def measure_pace(policy: LatentPolicy, process: Process, batch: int, through_decoder: bool = False) -> Pace:
    """Timed on zeros, on more and more images at once, up to `batch` or until a call is no longer quick. `through_decoder`: gradients go there as well.

    One image of many takes a tenth of the time of a lone one where the network is small, so a lone one says little. A sharded
    network is large, and all processes must make the same calls: it is timed on one image, and the slowest process counts.
    """
    # The wrapped network of several processes must not see a forward that its loop knows nothing of.
    policy = dataclasses.replace(policy, network=policy.denoiser)
    kept: dict[int, Tensor] = {}
    networks = (policy.denoiser, policy.tiny_vae or policy.vae)
    own = {weight.untyped_storage()._cdata for network in networks for weight in network.parameters()}
    batch, slowest = (1, lambda seconds: max(ranks.gathered(seconds))) if policy.sharded else (batch, lambda seconds: seconds)

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    def inputs(count: int) -> tuple[Tensor, Tensor, Tensor]:
        latents = torch.zeros(count, *policy.sample_shape, device=policy.device)
        return latents, process.times[0].to(policy.device), policy.encode.unconditional.expand(count, -1, -1)

    def train(count: int) -> None:
        output = policy.predict(*inputs(count))
        torch.autograd.grad(output.sum(), policy.parameters(), allow_unused=True)

    def held(function: Callable[[], Any]) -> int:
        kept.clear()
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            function()
        return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own)

    activations = held(lambda: policy.predict(*inputs(1)))
    painting = held(lambda: policy.sketch(inputs(1)[0].requires_grad_())) if through_decoder else 0
    kept.clear()
    with torch.no_grad():
        forward = _per_image(policy.device, slowest, lambda count: policy.predict(*inputs(count)), batch)
        decode = _per_image(policy.device, slowest, lambda count: policy.sketch(inputs(count)[0]), batch)
    with torch.enable_grad():
        trained = _per_image(policy.device, slowest, train, batch)
    return Pace(forward, trained, decode, activations, painting)


def _per_image(device: torch.device, slowest: Callable[[float], float], function: Callable[[int], Any], batch: int) -> float:
    """Seconds of an image in a call of many; where memory ends sooner than `batch`, of as many as it holds."""
    count, seconds, falling = 1, _timed(device, slowest, function, 1), True
    # Where other processes hold the cores, a call is slow whatever it computes: as long as an image costs less among more, it says nothing yet.
    while count < batch and (seconds < _QUICK or (falling and seconds < _SLOW)):
        more, before = min(4 * count, batch), seconds / count
        try:
            count, seconds = more, _timed(device, slowest, function, more)
            falling = seconds / count < 0.75 * before
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
    return seconds / count


def _timed(device: torch.device, slowest: Callable[[float], float], function: Callable[[int], Any], count: int) -> float:
    """Seconds of a call, the least of three where they are short: the first at a shape sets up kernels and memory, and another process may get in between."""
    seconds: list[float] = []
    while not seconds or (len(seconds) < 3 and sum(seconds) < 0.6):
        began = time.perf_counter()
        function(count)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(slowest(time.perf_counter() - began))
    return min(seconds)
