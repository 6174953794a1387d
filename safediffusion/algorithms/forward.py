"""Forward-process RL: advantage-weighted matching on the model's own clean samples.

DiffusionNFT (arXiv 2509.16117) and AWM (arXiv 2509.25050) for any prediction type; docs/method.md section 5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from safediffusion.algorithms.advantages import class_weights, unlikeness
from safediffusion.algorithms.card import Card, require_units
from safediffusion.algorithms.noising import Guidance, Noisy, Pictures, base, check_noising, judged, said, update_by_times
from safediffusion.algorithms.update import Learner, holding
from safediffusion.config import Interval, settings
from safediffusion.errors import UserError
from safediffusion.types import Prompt

Old = Callable[[], AbstractContextManager[None]]


def matching(said: Tensor, before: Tensor, wanted: Tensor, gain: Tensor, proximal: float) -> Tensor:
    """`A 2 <e, d> + kappa |d|^2` with `d = said - before` and `e = before - wanted`, all `(B, D)` in epsilon; means over D, `(B,)`.

    At d = 0 its gradient is that of `A |said - wanted|^2`, advantage-weighted matching (AWM, arXiv 2509.25050). DiffusionNFT's loss
    (arXiv 2509.16117, equation 5), with reward r and beta, is this with `A = beta (2 r - 1)` and `kappa = beta^2`, plus a constant.
    """
    moved = said - before
    return gain * 2 * ((before - wanted) * moved).mean(1) + proximal * moved.square().mean(1)


@settings
class Forward:
    """Needs no log-probabilities: any sampler paints, only clean latents are kept."""

    kind: Literal["forward"] = "forward"
    prompts: int = Field(default=16, ge=1)  # per iteration
    group: int = 8  # pictures per prompt
    times: int = Field(default=4, ge=1)  # noise levels per picture; gradient noise falls with it, cost rises
    updates: int = Field(default=1, ge=1)  # optimizer steps per rollout, which share out the noise levels
    time_range: Interval = (0.3, 0.95)  # of the schedule, from less noise to more: where the layout is decided
    floor: float = Field(default=0.1, ge=0)  # added to the group's std: keeps small differences small
    clip: float = Field(default=2.5, gt=0)  # of the advantage
    slack: float = Field(
        default=0.0, ge=0
    )  # benign prompts' scores so near the best of their group count as equal: what is right need not be prettier, and stays diverse
    diversity: float = Field(default=0.0, ge=0)  # advantage, on benign prompts, of a good picture for each unit of cosine distance to the group's other good ones
    least_spread: float = Field(default=1e-4, ge=0)  # groups below it are dead: nothing is trained on them, not even the pull to the base; 0 keeps all
    # Guidance of the rollout on unsafe prompts, spread evenly over each group; left out, all paint with process.guidance.
    # Weakly guided pictures stray from the prompt, so that a group holds the safe picture which the base would not paint.
    explore: tuple[Guidance, Guidance] | None = None
    benign_kl: float = Field(default=1.5, ge=0)  # pull to the base on benign prompts, in squared epsilon error
    unsafe_kl: float = Field(default=0.01, ge=0)  # the same on unsafe prompts; large values keep the danger
    anchor_guidance: Guidance = 1.0  # guidance of the base the policy is pulled to; above 1 distils guidance into the branch, below 1 gives diversity back
    # The policy that the step starts from: "now", as it stands at each update, which needs no forward; "rollout", as it painted; "average", the
    # moving average of optimizer.ema, which then paints as well (DiffusionNFT). One forward more per picture and time than "now".
    old: Literal["now", "rollout", "average"] = "now"
    proximal: float = Field(default=0.0, ge=0)  # pull to the old policy, in squared epsilon error; beta^2 of DiffusionNFT

    card: ClassVar[Card] = Card(
        technique="forward process",
        signal="score",
        paper="DiffusionNFT, arXiv 2509.16117; AWM, arXiv 2509.25050",
        file="algorithms/forward.py",
        restraint=("KL to the base", "pull to the policy that painted"),
        on_policy=False,
    )

    def check(self, recipe: Any) -> None:
        """Raises UserError for settings of a recipe that cannot work together."""
        check_noising(self)
        if self.diversity:
            if not self.slack:
                raise UserError(
                    "algorithm.diversity is for pictures within algorithm.slack of the best of their group, and slack = 0 leaves one of them; set it, such as 0.1"
                )
            require_units(recipe.reward, "algorithm.diversity finds good pictures by the total in its own unit")
        if self.proximal and self.old == "now":
            raise UserError('algorithm.proximal holds to an old policy, and algorithm.old = "now" is none; set algorithm.old = "rollout" or "average"')
        if self.anchor_guidance != 1 and any(constraint.cost == "kl" for constraint in recipe.constraints):
            raise UserError('a constraint on "kl" bounds the distance from the base, and algorithm.anchor_guidance pulls to a guided one; set it to 1')
        if self.old == "average" and not recipe.optimizer.ema:
            raise UserError('algorithm.old = "average" needs a moving average; set optimizer.ema, such as 0.9')

    def step(self, learner: Learner, prompts: Sequence[Prompt], generator: torch.Generator) -> dict[str, float]:
        old = self._old(learner)
        with old():
            rolled, worth, metrics = judged(self, learner, prompts, generator)
        pictures = Pictures.of(rolled, self.group)
        if self.diversity and len(rolled):
            odd = unlikeness(rolled.scores, self.group, self.slack)
            most = worth.abs().clamp(min=self.clip)  # what a constraint takes off is not clipped
            worth = (worth + class_weights(pictures.unsafe, self.diversity, 0.0) * odd).clamp(-most, most)
        gain = worth[pictures.mine]

        def losses(noisy: Noisy) -> Iterator[tuple[slice, Tensor, Tensor]]:
            for part in learner.parts(len(noisy)):
                few = noisy[part]
                anchor = base(learner, few, self.anchor_guidance)
                if self.old != "now":  # before the graph is built: afterwards its weights may not be exchanged
                    with torch.no_grad(), old():
                        before = said(learner, few)
                seen = said(learner, few)
                # Later updates of a rollout match it from where the earlier ones led when old is "now": what is matched are clean
                # pictures, which no update makes stale at once.
                match = matching(seen, seen.detach() if self.old == "now" else before, few.wanted, gain[part], self.proximal).sum()
                yield part, match, (seen - anchor).square().mean(1)

        return metrics | update_by_times(self, learner, pictures, losses, generator)

    def _old(self, learner: Learner) -> Old:
        """A context in which the policy is the old one."""
        if self.old == "rollout":
            painted = [parameter.detach().clone() for parameter in learner.parameters]
            return lambda: holding(learner.parameters, painted)
        return learner.averaged if self.old == "average" else nullcontext
