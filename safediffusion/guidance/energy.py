"""Reward guidance: every step leans towards a better-scored picture, by the gradient of the reward at the picture it foresees.

Universal guidance (arXiv 2302.07121, equation 6) without its recurrence; with the log-probability of a classifier as the reward it is classifier
guidance (arXiv 2105.05233, equation 14) on x0^.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from safediffusion.config import Interval, settings
from safediffusion.errors import UserError
from safediffusion.guidance.policy import Addressed
from safediffusion.rewards.combined import CombinedSettings, Single, parts_of
from safediffusion.rewards.detection import DetectionSettings
from safediffusion.rewards.scores import check_gradient
from safediffusion.types import Policy, Process, Prompt, Reward


@settings
class EnergySettings:
    """A guide of kind "reward"."""

    kind: Literal["reward"] = "reward"
    # The picture is drawn from `p(x) exp(scale r(x))` as far as the steps allow: larger is better scored and less like the model's own. 0 is the plain model.
    scale: float = Field(default=2.0, ge=0)
    # Of the schedule, from less noise to more, where the reward leads: in noise it sees nothing, at the end nothing can change.
    range: Interval = (0.0, 1.0)
    # Through the denoiser, two forwards more a step; false takes x0^ to move as x does (MPGD, arXiv 2311.16424), which costs only the decoder and the reward.
    through: bool = True
    # What a prompt's class is, nobody knows while painting: every prompt is taken for a safe one.
    reward: Annotated[Single | CombinedSettings, Field(discriminator="kind")] = DetectionSettings(score="log")

    def check(self) -> None:
        """Raises UserError for a reward that has no gradient, and for one that would only lead prompts marked unsafe."""
        if isinstance(self.reward, CombinedSettings):
            self.reward.check()
            if self.reward.normalise != "sum":
                raise UserError(
                    f'guide.reward.normalise = "{self.reward.normalise}" compares pictures of one prompt, and a guide follows the total of each; leave it out'
                )
        parts = [part for part in parts_of(self.reward) if part.weight]
        if not self.reward.differentiable:
            raise UserError(f"guide.reward: a reward of kind '{self.reward.kind}' has no gradient to be guided by; use one that has, such as \"detection\"")
        if any(getattr(part.reward, "steer", "all") == "unsafe" for part in parts):
            raise UserError('guide.reward.steer = "unsafe" moves the target of marked prompts, and nothing marks them here; set "all" or "gated"')
        if marked := next((part.name for part in parts if part.prompts == "unsafe"), None):
            raise UserError(f'guide.reward.parts: {marked} counts for prompts = "unsafe", and nothing marks them here; set "all"')


@dataclass(frozen=True, eq=False)
class Energy:
    """`e^ - scale s_t grad_x r(x0^)`, as the network's output. `process` is of the policy's schedule, whatever its steps."""

    process: Process
    reward: Reward
    scale: float
    range: tuple[float, float] = (0.0, 1.0)
    through: bool = True

    def __call__(self, policy: Policy, x: Tensor, time: Tensor, condition: Addressed, guidance: float | Tensor) -> Tensor:
        low, high = self.range
        signal, noise = self.process.signal_and_noise(time)
        # Noise alone, where a flow starts, foresees nothing that could be led.
        if not low <= self.process.share_of(time[0].item()) <= high or not signal.all():
            return policy.predict(x, time, condition.tensor, guidance)
        with torch.enable_grad():
            here = x.detach().clone().requires_grad_()
            with torch.set_grad_enabled(self.through):
                output = policy.predict(here, time, condition.tensor, guidance)
            epsilon = self.process.to_epsilon(output, here if self.through else x, time)
            foreseen = (here - noise * epsilon) / signal
            score = self.reward(policy.sketch(foreseen), [Prompt(text) for text in condition.prompts]).total
            check_gradient(score, "guide.reward")
            (uphill,) = torch.autograd.grad(score.sum(), here)
        unit = self.process.to_epsilon(torch.ones_like(x), torch.zeros_like(x), time)  # of e^ per unit of output
        return output.detach() - self.scale * noise * uphill / unit
