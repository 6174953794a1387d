"""DRaFT (arXiv 2309.17400): the gradient of the reward through the last steps of the walk; with a random number of them AlignProp (arXiv 2310.03739).

Nothing is guessed from samples, so it is the fastest method by far, and for the same reason the quickest to hack its reward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from safediffusion.algorithms.ascent import ascend, check_climbing, step_back, walked
from safediffusion.algorithms.card import Card
from safediffusion.algorithms.update import Learner
from safediffusion.config import Interval, settings
from safediffusion.errors import UserError
from safediffusion.rollout import Rollout
from safediffusion.types import Prompt


@settings
class Draft:
    """No pictures compete: each climbs its own reward, less what the constraints take off."""

    kind: Literal["draft"] = "draft"
    prompts: int = Field(default=16, ge=1)  # per iteration
    group: int = Field(default=2, ge=1)  # pictures per prompt
    last: int = Field(default=1, ge=1)  # steps that the gradient goes back through, K in the paper; through many of them it is large and says little
    truncate: Literal["fixed", "random"] = "fixed"  # "random" draws 1 to `last` steps in each iteration, which spreads the gradient over the noise levels
    # Noisy copies of the finished picture, at the last step's noise level, from which its last step is repeated: DRaFT-LV, for
    # last = 1; each costs a step and takes variance out of the gradient.
    copies: int = Field(default=0, ge=0)
    recompute: bool = False  # the activations of a step in the backward pass, instead of keeping them: memory of one step, a third more time
    times: int = Field(default=1, ge=1)  # noise levels per picture at which it is held to the base
    time_range: Interval = (0.3, 0.95)  # of the schedule, from less noise to more
    benign_kl: float = Field(default=3.0, ge=0)  # pull to the base on benign prompts, in squared epsilon error
    unsafe_kl: float = Field(default=0.01, ge=0)  # the same on unsafe prompts; large values keep the danger

    card: ClassVar[Card] = Card(
        technique="direct back-propagation",
        signal="gradient of the score",
        paper="DRaFT, arXiv 2309.17400; AlignProp, arXiv 2310.03739",
        file="algorithms/draft.py",
        reward_gradient=True,
        enters="loss",
    )

    def check(self, recipe: Any) -> None:
        """Raises UserError for settings of a recipe that cannot work together."""
        check_climbing(self, recipe, unfinished="algorithm.copies paints others; set it to 0" if self.copies else "")
        if self.last > recipe.process.steps:
            raise UserError(f"algorithm.last = {self.last} is more than the {recipe.process.steps} steps of the walk; lower it")
        if self.copies and self.last != 1:
            raise UserError(f"algorithm.copies repeats the last step alone; set algorithm.last = 1 instead of {self.last}, or algorithm.copies = 0")

    def step(self, learner: Learner, prompts: Sequence[Prompt], generator: torch.Generator) -> dict[str, float]:
        rolled, metrics = walked(self, learner, prompts, generator)
        clean, count = rolled.walk.clean, len(learner.process.times)
        last = int(torch.randint(1, self.last + 1, (), generator=generator)) if self.truncate == "random" else self.last
        noises = [torch.randn((len(rolled), *clean.shape[1:]), generator=generator)[rolled.mine].to(clean.device) for _ in range(self.copies)]

        def paint(part: slice) -> Iterator[Tensor]:
            yield self._walked(learner, rolled, part, rolled.walk.states[count - last][part], range(count - last, count))
            for noise in noises:
                time = learner.process.times[-1].expand(len(noise[part]))
                yield self._walked(learner, rolled, part, learner.process.noised(clean[part], noise[part], time)[0], (count - 1,))

        return metrics | ascend(self, learner, rolled, paint, 1 + self.copies, generator)

    def _walked(self, learner: Learner, rolled: Rollout, part: slice, x: Tensor, steps: Sequence[int]) -> Tensor:
        for step in steps:
            x, _ = step_back(self, learner, rolled, part, x, step)
        return x
