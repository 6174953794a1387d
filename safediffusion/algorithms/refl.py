"""ReFL (ImageReward, arXiv 2304.05977, section 3): the gradient of the reward through the picture that a late step already foresees.

In the paper's place of the loss on pretraining pictures stands the pull to the base, and the reward is raised as it is, without a hinge.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from safediffusion.algorithms.ascent import ascend, check_climbing, step_back, walked
from safediffusion.algorithms.card import Card
from safediffusion.algorithms.update import Learner
from safediffusion.config import Interval, settings
from safediffusion.types import Prompt


@settings
class Refl:
    """One step is drawn in each iteration; its x0^ is scored, and the gradient goes back through that step alone."""

    kind: Literal["refl"] = "refl"
    prompts: int = Field(default=16, ge=1)  # per iteration
    group: int = Field(default=2, ge=1)  # pictures per prompt
    # Of the walk's steps, counted from the end, the share that one is drawn from: the last 10 of 40 in the paper. Earlier steps change more of the
    # picture, but what they foresee is blurred, and the reward was not made for that.
    late: Annotated[float, Field(gt=0, le=1)] = 0.6
    recompute: bool = False  # the step's activations in the backward pass, instead of keeping them beside the decoder's
    times: int = Field(default=1, ge=1)  # noise levels per picture at which it is held to the base
    time_range: Interval = (0.3, 0.95)  # of the schedule, from less noise to more
    benign_kl: float = Field(default=3.0, ge=0)  # pull to the base on benign prompts, in squared epsilon error
    unsafe_kl: float = Field(default=0.01, ge=0)  # the same on unsafe prompts; large values keep the danger

    card: ClassVar[Card] = Card(
        technique="direct back-propagation",
        signal="gradient of the score",
        paper="ReFL, arXiv 2304.05977",
        file="algorithms/refl.py",
        reward_gradient=True,
        enters="loss",
    )

    def check(self, recipe: Any) -> None:
        """Raises UserError for settings of a recipe that cannot work together."""
        check_climbing(self, recipe, unfinished="algorithm.kind = 'refl' scores what a step foresees; constrain \"kl\"")

    def step(self, learner: Learner, prompts: Sequence[Prompt], generator: torch.Generator) -> dict[str, float]:
        rolled, metrics = walked(self, learner, prompts, generator)
        count = len(learner.process.times)
        step = count - 1 - int(torch.randint(max(1, round(self.late * count)), (), generator=generator))

        def paint(part: slice) -> Iterator[Tensor]:
            yield step_back(self, learner, rolled, part, rolled.walk.states[step][part], step)[1]

        return metrics | ascend(self, learner, rolled, paint, 1, generator)
