"""Reward-ranked fine-tuning (RAFT, arXiv 2304.06767): the denoising loss on the best picture of each prompt alone."""

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
class Raft:
    """The best of each group is learned from, the others are thrown away: cheap to train, dear to paint."""

    kind: Literal["raft"] = "raft"
    prompts: int = Field(default=16, ge=1)  # per iteration
    group: int = 8  # pictures per prompt, of which the best is kept
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
        technique="reward-weighted likelihood",
        signal="best of a group",
        paper="RAFT, arXiv 2304.06767",
        file="algorithms/raft.py",
        feedback=("automated", "ranked"),
        on_policy=False,
        enters="label",
    )

    def check(self, recipe: Any) -> None:
        """Raises UserError for settings of a recipe that cannot work together."""
        check_noising(self)

    def step(self, learner: Learner, prompts: Sequence[Prompt], generator: torch.Generator) -> dict[str, float]:
        rolled, worth, metrics = judged(self, learner, prompts, generator)
        groups = worth.view(-1, self.group)
        best = rolled[groups.argmax(1).cpu() + self.group * torch.arange(len(groups))]
        pictures = Pictures.of(best, 1)
        return metrics | update_by_times(self, learner, pictures, weighted(learner, torch.ones(len(pictures.mine), device=worth.device)), generator)
