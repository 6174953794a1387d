"""The variance-preserving schedule of SD1.x, SD2.x and SDXL: `a = sqrt(abar)`, `s = sqrt(1 - abar)`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class VariancePreserving:
    """M training times, 0 to M - 1, long (M = 1000 for Stable Diffusion).

    alphas_cumprod: `(M,)` float, `abar` at each time, on the CPU whatever the model's device.
    final_alpha_cumprod: `abar` of the finished latent; SD ships abar at time 0 (`set_alpha_to_one = False`).
    """

    alphas_cumprod: Tensor
    final_alpha_cumprod: float = 1.0

    @property
    def top(self) -> float:
        return len(self.alphas_cumprod) - 1

    @property
    def final(self) -> tuple[float, float]:
        return self.final_alpha_cumprod, 1 - self.final_alpha_cumprod

    def powers(self, time: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        alphas_cumprod = self.alphas_cumprod.to(time.device, dtype)[time]
        return alphas_cumprod, 1 - alphas_cumprod

    def time_at(self, share: Tensor) -> Tensor:
        """Never 0: there is next to no noise there to tell from the picture."""
        count = len(self.alphas_cumprod)
        return (share * count).long().clamp(1, count - 1)

    def share_of(self, time: float) -> float:
        return time / len(self.alphas_cumprod)


def diffusion_grid(config: Mapping[str, Any], steps: int) -> tuple[VariancePreserving, Tensor, str]:
    """The schedule, times `(steps,)` and prediction type of diffusers' DDIMScheduler, from any VP scheduler's config.

    A config without `clip_sample` is read as one that does not clip, because latents are not confined to [-1, 1].
    Raises ValueError for a config that clips or thresholds, or predicts what only a flow does. Where the spacing is uneven
    (linspace, or trailing with steps that do not divide M) a step lands on the next time of the grid, as in DDPMScheduler;
    DDIMScheduler lands M // steps below.
    """
    from diffusers import DDIMScheduler

    # Passed apart from the config, because from_config drops keys that the config lists as defaults.
    scheduler = DDIMScheduler.from_config(dict(config), clip_sample=config.get("clip_sample", False))
    if scheduler.config.clip_sample or scheduler.config.thresholding:
        raise ValueError("clipping x0 is not supported: set clip_sample and thresholding to false in the config")
    if scheduler.config.prediction_type == "velocity":
        raise ValueError('prediction_type "velocity" is that of a flow, and the config has a beta_schedule')
    scheduler.set_timesteps(steps)
    schedule = VariancePreserving(scheduler.alphas_cumprod, float(scheduler.final_alpha_cumprod))
    return schedule, scheduler.timesteps, scheduler.config.prediction_type
