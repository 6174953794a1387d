"""Reward-weighted regression: the denoising loss on the model's own pictures, each weighted by the exponential of what it is worth.

Peters and Schaal, ICML 2007; for text-to-image models arXiv 2302.12192, and DDPO's RWR (arXiv 2305.13301, section 4.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from safediffusion.algorithms.card import Card
from safediffusion.algorithms.noising import Guidance, Pictures, check_noising, judged, update_by_times, weighted
from safediffusion.algorithms.update import Learner
from safediffusion.config import Interval, settings
from safediffusion.types import Prompt


@settings
class Rwr:
    """Every picture is learned from, the better the more; none is pushed away."""

    kind: Literal["rwr"] = "rwr"
    prompts: int = Field(default=16, ge=1)  # per iteration
    group: int = 8  # pictures per prompt
    temperature: float = Field(default=0.3, gt=0)  # of the weights exp(advantage / temperature): lower learns from the best alone, higher from all alike
    times: int = Field(default=4, ge=1)  # noise levels per picture; gradient noise falls with it, cost rises
    updates: int = Field(default=1, ge=1)  # optimizer steps per rollout, which share out the noise levels
    time_range: Interval = (0.3, 0.95)  # of the schedule, from less noise to more: where the layout is decided
    floor: float = Field(default=0.1, ge=0)  # added to the group's std: keeps small differences small
    clip: float = Field(default=2.5, gt=0)  # of the advantage
    slack: float = Field(default=0.0, ge=0)  # benign prompts' scores so near the best of their group count as equal
    least_spread: float = Field(default=1e-4, ge=0)  # groups below it are dead: nothing is trained on them; 0 keeps all
    explore: tuple[Guidance, Guidance] | None = None  # guidance of the rollout on unsafe prompts, spread over each group; left out, it is process.guidance
    benign_kl: float = Field(default=1.5, ge=0)  # pull to the base on benign prompts, in squared epsilon error
    unsafe_kl: float = Field(default=0.01, ge=0)  # the same on unsafe prompts; large values keep the danger

    card: ClassVar[Card] = Card(
        technique="reward-weighted likelihood", signal="score", paper="RWR, arXiv 2302.12192", file="algorithms/rwr.py", on_policy=False, enters="weight of a picture"
    )

    def check(self, recipe: Any) -> None:
        """Raises UserError for settings of a recipe that cannot work together."""
        check_noising(self)

    def step(self, learner: Learner, prompts: Sequence[Prompt], generator: torch.Generator) -> dict[str, float]:
        rolled, worth, metrics = judged(self, learner, prompts, generator)
        # Within each group: over all pictures, those of prompts on which a constraint weighs heavily would leave nothing for the rest.
        weight = self.group * (worth.view(-1, self.group) / self.temperature).softmax(1).flatten()
        pictures = Pictures.of(rolled, self.group)
        return metrics | update_by_times(self, learner, pictures, weighted(learner, weight[pictures.mine]), generator)
