"""The schedule of a rectified flow (arXiv 2209.03003), SD3's and FLUX's: `a = 1 - sigma`, `s = sigma`, with the shift of times to more noise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

_REFUSED = ("invert_sigmas", "shift_terminal", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


@dataclass(frozen=True)
class RectifiedFlow:
    """Training times are floats, `sigma * scale`, from 0 (clean) to `scale` (noise alone).

    shift: alpha of SD3 (arXiv 2403.03206, equation 23), `sigma = alpha u / (1 + (alpha - 1) u)` at the share u of the schedule. Larger pictures
        have more pixels that tell of the same thing, so they need more noise.
    scale: what the network takes for sigma = 1.
    """

    shift: float = 1.0
    scale: float = 1000.0

    @property
    def top(self) -> float:
        return self.scale

    @property
    def final(self) -> tuple[float, float]:
        return 1.0, 0.0

    def powers(self, time: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        sigma = time.to(dtype) / self.scale
        return (1 - sigma).square(), sigma.square()

    def time_at(self, share: Tensor) -> Tensor:
        return self.scale * self.shift * share / (1 + (self.shift - 1) * share)

    def share_of(self, time: float) -> float:
        """Rounded, so that bounds such as 0.7 are met by the times of an even grid, which are float32."""
        sigma = time / self.scale
        return round(sigma / (self.shift - (self.shift - 1) * sigma), 6)


def tokens_in(shape: tuple[int, int, int], patch: int) -> int:
    """Image tokens that a transformer makes of a latent (C, h, w), each of `patch` x `patch` cells."""
    return (shape[1] // patch) * (shape[2] // patch)


def flow_grid(config: Mapping[str, Any], steps: int, tokens: int | None) -> tuple[RectifiedFlow, Tensor, str]:
    """The schedule and times `(steps,)` of diffusers' FlowMatchEulerDiscreteScheduler; the network predicts the velocity.

    With `use_dynamic_shifting` the shift grows with the number of image tokens, as FluxPipeline computes it. There are two grids over
    the schedule: FluxPipeline's falls evenly from 1 to 1 / steps, SD3's to the least noise of training. Which one is the pipeline's choice and in no
    scheduler's config; `even_sigmas` in `config` says the former, and where it is left out a dynamic shift does.
    Raises ValueError for a dynamic shift without `tokens`, and for grids that other pipelines have.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    if refused := [name for name in _REFUSED if config.get(name)]:
        raise ValueError(f"a flow's scheduler with {refused[0]} is not supported: its grid is another pipeline's")
    # Before the scheduler reads it: keys that it does not know are warned of.
    config, even = dict(config), config.get("even_sigmas", config.get("use_dynamic_shifting", False))
    config.pop("even_sigmas", None)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    dynamic = scheduler.config.use_dynamic_shifting
    if dynamic and tokens is None:
        raise ValueError("the scheduler shifts its times by the size of the picture (use_dynamic_shifting); say how many image tokens it has")
    mu = _mu(scheduler.config, tokens) if dynamic else None
    if even:
        scheduler.set_timesteps(sigmas=numpy.linspace(1.0, 1 / steps, steps), mu=mu)
    else:
        scheduler.set_timesteps(steps, mu=mu)
    shift = scheduler.shift if mu is None else mu if scheduler.config.time_shift_type == "linear" else math.exp(mu)
    top = scheduler.config.num_train_timesteps
    return RectifiedFlow(shift, top), scheduler.timesteps.clamp(max=top), "velocity"  # a shift such as 1.57 rounds the first time to just above it


def _mu(config: Any, tokens: int) -> float:
    """Log of the shift, a line in the number of tokens through two sizes (`calculate_shift` of diffusers' FluxPipeline)."""
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return tokens * slope + config.base_shift - slope * config.base_image_seq_len
