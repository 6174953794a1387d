"""Safe Latent Diffusion (arXiv 2211.05105): guidance away from a concept, where the picture is heading for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from safediffusion.config import settings
from safediffusion.errors import UserError
from safediffusion.guidance.policy import Addressed
from safediffusion.types import Policy, Process


class Strength(NamedTuple):
    """Constants of a level: warm-up as a share of the walk, guidance scale s_S, threshold lambda, momentum scale s_m and beta_m."""

    warm_up: float
    scale: float
    threshold: float
    momentum: float
    beta: float


# Hyp-Weak to Hyp-Max as in the paper's code, which became diffusers' `SafetyConfig`; the warm-up there is 15, 10, 7 and 0 steps of 50.
LEVELS = {
    "weak": Strength(0.3, 20, 0.0, 0.0, 0.0),
    "medium": Strength(0.2, 1000, 0.01, 0.3, 0.4),
    "strong": Strength(0.14, 2000, 0.025, 0.5, 0.7),
    "max": Strength(0.0, 5000, 1.0, 0.5, 0.7),
}


@settings
class SldSettings:
    """A guide of kind "sld"."""

    kind: Literal["sld"] = "sld"
    level: Literal["weak", "medium", "strong", "max"] = "medium"
    # What to keep away from, in words that the model's text encoder knows. The paper's own list is longer and coarser; name what you fear.
    concept: str = "hate, harassment, violence, suffering, self-harm, nudity, blood, weapons, theft, cruelty"
    scale: float | None = Field(default=None, ge=0)  # in place of the level's; 0 is the plain model

    def check(self) -> None:
        """Raises UserError for a concept without words."""
        if not self.concept.strip():
            raise UserError("guide.concept is empty; name what to keep away from, such as 'weapons'")


@dataclass(eq=False)
class SafeLatent:
    """Section 3 of the paper; one forward of 3B each step. Its momentum lives from a walk's first step to its last."""

    process: Process
    concept: str
    strength: Strength
    _momentum: Tensor | None = field(default=None, init=False)
    _time: float = field(default=-1, init=False)

    def __call__(self, policy: Policy, x: Tensor, time: Tensor, condition: Addressed, guidance: float | Tensor) -> Tensor:
        if self.strength.scale == 0:  # three branches at once round otherwise than two
            return policy.predict(x, time, condition.tensor, guidance)
        branches = policy.encode.unconditional, condition.tensor, policy.encode([self.concept])  # SDXL's without a prompt is zero, and not that of ""
        texts = torch.cat([each.expand_as(condition.tensor) for each in branches])
        empty, told, unsafe = policy.predict(x.repeat(3, 1, 1, 1), time.repeat(3), texts).chunk(3)
        g = torch.as_tensor(guidance, dtype=torch.float32, device=x.device).view(-1, 1, 1, 1)
        unit = self.process.to_epsilon(torch.ones_like(x), torch.zeros_like(x), time)  # of e^ per unit of output: the constants are those of e^
        away = self._away((told - unsafe) * unit, (unsafe - empty) * unit, time[0].item()) / unit.where(unit != 0, 1)  # in noise alone an output says nothing of e^
        return empty + g * (told - empty - away)

    def _away(self, difference: Tensor, direction: Tensor, time: float) -> Tensor:
        """gamma of the paper, what is taken off the guidance, in e^: `mu * direction` and momentum, after the warm-up."""
        warm_up, scale, threshold, momentum, beta = self.strength
        if time >= self._time or self._momentum is None or self._momentum.shape != direction.shape:
            self._momentum = torch.zeros_like(direction)  # times fall during a walk, so this is another one's first step
        weight = torch.where(difference < threshold, (difference.abs() * scale).clamp(max=1), 0.0)
        away = weight * direction + momentum * self._momentum
        self._momentum, self._time = beta * self._momentum + (1 - beta) * away, time
        return away if self.process.share_of(time) < 1 - warm_up else torch.zeros_like(away)
