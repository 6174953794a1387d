"""Diffusion-DPO (arXiv 2311.12908): of two pictures of a prompt, the better becomes easier to denoise against the base, the worse harder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from safediffusion import ranks
from safediffusion.algorithms.card import Card
from safediffusion.algorithms.noising import Guidance, Noisy, Pictures, base, check_noising, error, judged, said, update_by_times
from safediffusion.algorithms.update import Learner
from safediffusion.config import Interval, settings
from safediffusion.errors import UserError
from safediffusion.types import Prompt


def preference(gap: Tensor, worth: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Loss and share of pairs in order, both `(G,)`, of G groups of K: `gap` (G, K) is e - e_base, `worth` (G, K) says which of two is better.

    `K / beta` times the mean over pairs of `-log sigmoid(-beta (gap_better - gap_worse))`: equation 14 with e as a mean over dimensions and `T w`
    within beta, as in the authors' code. The factor makes the gradient at the base that of +-e, so that the pull to the
    base weighs as in the other methods. Without a pair, both are 0.
    """
    better = worth[:, :, None] > worth[:, None, :]
    ahead = beta * (gap[:, None, :] - gap[:, :, None])  # [g, i, j]: by how much the policy prefers i to j, against the base
    pairs = better.sum((1, 2)).clamp(min=1)
    loss = (better * F.softplus(-ahead)).sum((1, 2)) / pairs
    return loss * gap.shape[1] / beta, (better & (ahead > 0)).sum((1, 2)) / pairs


@settings
class Dpo:
    """Pairs come from the objective, which orders the pictures of a group, or from a folder of pictures that somebody has sorted."""

    kind: Literal["dpo"] = "dpo"
    prompts: int = Field(default=16, ge=1)  # per iteration
    group: int = 8  # pictures per prompt
    pairs: Literal["extremes", "all"] = "extremes"  # the best and the worst of a group; or every two pictures of it, each trained on
    dataset: str | None = None  # a folder of sorted pairs (docs/extending.md): nothing is painted, and neither reward nor data.safe and data.unsafe are used
    # How soon a pair counts as learned, per mean squared epsilon error; the paper's 5000 on SD1.x is 2500 here, as its code halves it.
    beta: float = Field(default=100.0, gt=0)
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
        technique="preference optimisation",
        signal="pairs",
        paper="Diffusion-DPO, arXiv 2311.12908",
        file="algorithms/dpo.py",
        feedback=("human", "automated", "ranked"),  # whose word the pairs of a folder are
        restraint=("KL to the base", "loss against the base"),
        pairs=True,
        on_policy=False,
        safety=("constraint", "preference"),  # nothing is painted beside the pairs of a folder, so that no cost but "kl" is observed
        enters="pair",
    )

    def check(self, recipe: Any) -> None:
        """Raises UserError for settings of a recipe that cannot work together."""
        check_noising(self)
        if self.dataset is not None and self.group != 2:
            raise UserError(f"algorithm.dataset holds pairs, and algorithm.group = {self.group}; set algorithm.group = 2")
        if self.dataset is not None and any(constraint.cost != "kl" for constraint in recipe.constraints):
            raise UserError('the cost of a constraint is of painted pictures, and with algorithm.dataset none are painted; leave one of them out, or constrain "kl"')

    def step(self, learner: Learner, prompts: Sequence[Prompt], generator: torch.Generator) -> dict[str, float]:
        pictures, worth, metrics = self._given(learner, prompts, generator) if self.dataset else self._painted(learner, prompts, generator)
        worth, size, ordered = worth[pictures.mine].view(-1, pictures.group), pictures.group, torch.zeros((), device=worth.device)

        def losses(noisy: Noisy) -> Iterator[tuple[slice, Tensor, Tensor]]:
            for part in learner.parts(len(noisy), size):  # the pictures of a pair share a graph
                few, groups = noisy[part], slice(part.start // size, part.stop // size)
                anchor, seen = base(learner, few), said(learner, few)
                loss, right = preference((error(seen, few) - error(anchor, few)).view(-1, size), worth[groups], self.beta)
                ordered.add_(right.sum())
                yield part, loss.sum(), (seen - anchor).square().mean(1)

        metrics |= update_by_times(self, learner, pictures, losses, generator)
        looked_at = len(pictures.unsafe) // size * self.times
        return metrics | ({"pairs/ordered": float(ranks.summed(ordered)) / looked_at} if looked_at else {})

    def _painted(self, learner: Learner, prompts: Sequence[Prompt], generator: torch.Generator) -> tuple[Pictures, Tensor, dict[str, float]]:
        rolled, worth, metrics = judged(self, learner, prompts, generator)
        if self.pairs == "all":
            return Pictures.of(rolled, self.group), worth, metrics
        order = worth.view(-1, self.group).argsort(dim=1, descending=True, stable=True)[:, [0, -1]].cpu()
        index = (order + self.group * torch.arange(len(order))[:, None]).flatten()
        return Pictures.of(rolled[index], 2), worth[index.to(worth.device)], metrics

    def _given(self, learner: Learner, prompts: Sequence[Prompt], generator: torch.Generator) -> tuple[Pictures, Tensor, dict[str, float]]:
        draws = torch.rand(len(prompts), generator=generator).tolist()  # which pair of a prompt that has several
        own, held = ranks.share(len(prompts)), 2 * ranks.held(len(prompts))
        clean = learner.pairs([prompts[i] for i in own], [draws[i] for i in own])[:held]
        condition = learner.policy.encode([prompts[i].text for i in own]).repeat_interleave(2, 0)[:held]
        mine = (2 * torch.tensor(own)[:, None] + torch.arange(2)).flatten()[:held]
        unsafe = torch.tensor([prompt.unsafe for prompt in prompts], device=clean.device).repeat_interleave(2)
        return Pictures(clean, condition, mine, unsafe, 2), torch.tensor([1.0, 0.0], device=clean.device).repeat(len(prompts)), {}
