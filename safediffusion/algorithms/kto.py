"""Diffusion-KTO (arXiv 2404.04465): pictures that are only called desirable or not, and a utility that saturates about a reference point."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from safediffusion import ranks
from safediffusion.algorithms.card import Card, require_units
from safediffusion.algorithms.noising import Guidance, Noisy, Pictures, base, check_noising, error, judged, said, update_by_times
from safediffusion.algorithms.update import Learner
from safediffusion.config import Interval, settings
from safediffusion.errors import UserError
from safediffusion.types import Prompt


@settings
class Kto:
    """Needs a label per picture, no scale and no partner. The loss is `(4 / beta) weight (1 - sigmoid(+-(r - Q)))`.

    r = -beta (e - e_base) is what a picture's own likelihood says of it, with e its denoising error (mean over dimensions, as in the authors'
    code); Q is the mean of r over all pictures at a noise level, at least 0 and without gradient (equation 8). The factor 4 / beta makes the
    gradient at the base that of +-e, so that the pull to the base weighs as in the other methods.
    """

    kind: Literal["kto"] = "kto"
    prompts: int = Field(default=16, ge=1)  # per iteration
    group: int = 8  # pictures per prompt
    # Desirable is a picture that is worth more than the mean of its group, under the objective; or, where this is given, one whose total reward is above it.
    threshold: float | None = None
    beta: float = Field(default=100.0, gt=0)  # how soon the utility saturates, per mean squared epsilon error; the paper has 5000 at the 16,384 numbers of SD1.x
    desirable: float = Field(default=1.0, ge=0)  # weight of desirable pictures; the two kinds of a group weigh alike before, however many they are
    undesirable: float = Field(default=1.0, ge=0)  # the same of the others
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
        technique="binary utility",
        signal="label",
        paper="Diffusion-KTO, arXiv 2404.04465",
        file="algorithms/kto.py",
        feedback=("automated", "binary"),
        restraint=("KL to the base", "loss against the base"),
        on_policy=False,
        enters="label",
    )

    def check(self, recipe: Any) -> None:
        """Raises UserError for settings of a recipe that cannot work together."""
        check_noising(self)
        if self.desirable == self.undesirable == 0:
            raise UserError("algorithm.desirable and algorithm.undesirable are both 0, so nothing is learned; set one above 0")
        if self.threshold is not None and any(constraint.cost != "kl" for constraint in recipe.constraints):
            raise UserError("algorithm.threshold labels pictures by the total reward, which no constraint enters; leave it out, and labels come from the objective")
        if self.threshold is not None:
            require_units(recipe.reward, "algorithm.threshold labels pictures by the total in its own unit")

    def step(self, learner: Learner, prompts: Sequence[Prompt], generator: torch.Generator) -> dict[str, float]:
        rolled, worth, metrics = judged(self, learner, prompts, generator)
        pictures = Pictures.of(rolled, self.group)
        # Pictures that are worth the same differ from their mean by rounding: they have no label.
        side = torch.where(worth.abs() > 1e-4, worth.sign(), 0.0) if self.threshold is None else torch.where(rolled.scores.total > self.threshold, 1.0, -1.0)
        metrics |= {"desirable": float((side > 0).float().mean())} if len(side) else {}
        side, weight = side[pictures.mine], self._weights(side)[pictures.mine]

        def losses(noisy: Noisy) -> Iterator[tuple[slice, Tensor, Tensor]]:
            parts = learner.parts(len(noisy))
            # The reference point is of all pictures, which are in no graph together: they are looked at once before.
            anchors, errors = [], [torch.zeros(0, device=worth.device)]
            with torch.no_grad():
                for part in parts:
                    few = noisy[part]
                    anchors.append(base(learner, few))
                    errors.append(error(anchors[-1], few) - error(said(learner, few), few))
            point = (self.beta * ranks.summed(torch.cat(errors).sum()) / len(rolled)).clamp(min=0)
            for part, anchor in zip(parts, anchors, strict=True):
                few = noisy[part]
                seen = said(learner, few)
                own = self.beta * (error(anchor, few) - error(seen, few))
                utility = (side[part] * (own - point)).sigmoid()
                yield part, 4 / self.beta * (weight[part] * (1 - utility)).sum(), (seen - anchor).square().mean(1)

        return metrics | update_by_times(self, learner, pictures, losses, generator)

    def _weights(self, side: Tensor) -> Tensor:
        """The two kinds of a group weigh alike: the authors sample them evenly, we weigh them so. 0 for a picture of neither kind, `(B,)`."""
        weight = torch.zeros_like(side).view(-1, self.group)
        for kind, own in ((1.0, self.desirable), (-1.0, self.undesirable)):
            here = (side == kind).view(-1, self.group)
            weight = weight + own * here * self.group / (2 * here.sum(1, keepdim=True).clamp(min=1))
        return weight.flatten()
