"""D3PO: direct preference optimisation of denoising steps, on pairs of trajectories of one prompt (arXiv 2311.13231).

Per trained step `-log sigmoid(beta (log pi(w) / ref(w) - log pi(l) / ref(l)))`, in which w is the better trajectory of a pair and l the worse,
and the reference is the base model. No log-probability of the rollout is needed, so later updates need no clipping.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from safediffusion.algorithms.card import Card
from safediffusion.algorithms.trajectory import Losses, TrainGuidance, check_denoising, moments, shuffled, trained_steps, update_by_groups
from safediffusion.algorithms.update import Learner
from safediffusion.config import settings
from safediffusion.rollout import Rollout
from safediffusion.types import Prompt


@settings
class D3po:
    """Only the order of the pictures of a prompt counts, by what they are worth under reward and constraints."""

    kind: Literal["d3po"] = "d3po"
    prompts: int = Field(default=16, ge=1)  # per iteration
    group: int = 8  # pictures per prompt
    updates: int = Field(default=1, ge=1)  # optimizer steps per rollout, each on whole groups
    # "all" trains every picture, against each that is worse; "extremes" the best and the worst of each group, for 2 / `group` of
    # the forwards. A micro-batch holds all that are compared, even where optimizer.batch is less.
    pairs: Literal["extremes", "all"] = "all"
    # Of the log-ratio per latent dimension: the larger, the nearer to the base a pair counts as told apart and is left alone. What it means per
    # nat falls with the dimensions: 30 is about 0.1 for the 256 of the embedded model; SD1.x, with 16,384, takes about 2000 for the same.
    beta: float = Field(default=30.0, gt=0)
    train_guidance: TrainGuidance = "off"  # as in grpo
    train_steps: int = Field(default=0, ge=0)  # of the noisy steps trained in each iteration, drawn anew; 0 is all
    drop_last: int = Field(default=1, ge=0)  # stochastic steps left out at the end, where log-probability is most sensitive (docs/method.md section 3)
    normalise_ratio: bool = True  # divide the log-ratio by the sensitivity of its step, so that all steps weigh alike
    floor: float = Field(default=0.02, ge=0)  # added to the group's std, before constraints are weighed against it
    clip: float = Field(default=2.5, gt=0)  # of the advantage, likewise
    slack: float = Field(default=0.0, ge=0)  # benign prompts' scores so near the best of their group count as equal: they make no pair
    least_spread: float = Field(default=1e-4, ge=0)  # groups below it are dead: nothing is trained on them, not even the pull to the base; 0 keeps all
    benign_kl: float = Field(default=1.0, ge=0)  # weight of KL(policy || base) per dimension on benign prompts; the paper has beta alone
    unsafe_kl: float = Field(default=0.01, ge=0)  # the same on unsafe prompts; large values keep the danger

    card: ClassVar[Card] = Card(
        technique="preference optimisation",
        signal="pairs",
        paper="D3PO, arXiv 2311.13231",
        file="algorithms/d3po.py",
        feedback=("automated", "ranked"),
        restraint=("KL to the base", "loss against the base"),
        log_probs=True,
        pairs=True,
        on_policy=False,
        enters="pair",
    )

    def check(self, recipe: Any) -> None:
        """Raises UserError for settings of a recipe that cannot work together."""
        check_denoising(self, recipe)

    def step(self, learner: Learner, prompts: Sequence[Prompt], generator: torch.Generator) -> dict[str, float]:
        rolled = learner.paint(prompts, self.group, generator, remember=True)
        gain, metrics = learner.worth(rolled, self.floor, self.clip, self.least_spread, self.slack)
        groups = shuffled(gain, self.group, generator)
        if self.pairs == "extremes":
            groups = groups.gather(1, gain.value.cpu()[groups].argsort(dim=1, stable=True)[:, [0, -1]])
        steps = trained_steps(self, learner.process, self.drop_last, generator)
        losses = self._losses(learner, steps, groups.shape[1])
        return metrics | update_by_groups(self, learner, rolled, gain.value, groups, losses, ("loss", "kl", "accuracy"))

    def _losses(self, learner: Learner, steps: tuple[int, ...], size: int) -> Losses:
        """Of groups of `size` trajectories: means over the pairs of a group, over groups and steps."""

        def losses(rolled: Rollout, gain: Tensor, totals: Tensor) -> Iterator[Tensor]:
            gain, share = gain[rolled.mine], 1 / (len(rolled) * len(steps))
            for moment in moments(self, learner, learner.process, steps, rolled, against_base=True, whole=size):
                loss, accuracy = preferred(moment.above_base.view(-1, size), gain[moment.part].view(-1, size), self.beta)
                logged = (loss.detach() * size, moment.kl.detach(), accuracy * size, torch.ones_like(moment.kl))
                totals += torch.stack([each.sum() for each in logged])
                # Divided by beta, the gradient at the base does not grow with it, nor against the pull; AdamW would not see the factor.
                yield (loss.sum() * size / self.beta + moment.pull.sum()) * share

        return losses


def preferred(above: Tensor, worth: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Mean of `-log sigmoid(beta (above_w - above_l))` over the pairs of each group, and the share that the policy tells right; `(G,)` each.

    above: log-ratios to the base `(G, K)`; worth: `(G, K)`, of which equal ones make no pair. A group without pairs has 0.
    """
    better = (worth[:, :, None] > worth[:, None, :]).float()
    margin = beta * (above[:, :, None] - above[:, None, :])
    count = better.sum((1, 2)).clamp(min=1)
    return (-logsigmoid(margin) * better).sum((1, 2)) / count, ((margin.detach() > 0) * better).sum((1, 2)) / count
