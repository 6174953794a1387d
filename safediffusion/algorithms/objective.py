"""What a run wants: one reward, several normalised apart, and constraints that come before all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from safediffusion.algorithms.advantages import Advantages, Baseline, advantages, own_group, reward_metrics
from safediffusion.algorithms.lagrangian import AugmentedLagrangian, State
from safediffusion.config import settings
from safediffusion.errors import UserError
from safediffusion.rollout import DRIFT
from safediffusion.types import Class, Prompt, Scores, mask

_STATE = "constraints."  # of its entries in Learner.memory


@settings
class Constraint:
    """A `[[constraints]]` table: the mean of a cost over the pictures of a class of prompts is to stay within a budget.

    cost: a part of the reward by the name that metrics.jsonl has it under, without "reward/"; "kl", the policy's own distance from the base
        as its algorithm measures it; or "drift", how far pictures lie from what the base paints from the same noise (`rollout.with_drift`).
    """

    cost: str
    budget: float
    at: Literal["most", "least"] = "most"  # "least" for a part of which more is better, such as a steering reward's "safety"
    prompts: Class = "unsafe"  # "kl" is of all prompts and "drift" of benign ones, whatever this says
    smooth: float = Field(default=0.8, ge=0, lt=1)  # of the observed cost from one iteration to the next: a rollout is a small sample

    @property
    def about(self) -> Class:
        """The prompts whose pictures it is about."""
        return "safe" if self.cost == DRIFT else self.prompts


@dataclass(frozen=True)
class Weight:
    """A part of the reward that is normalised by itself, and for which prompts it counts."""

    value: float
    prompts: Class = "all"


@dataclass(frozen=True)
class Objective:
    """How scores become advantages.

    parts: where it names any, the advantages are the weighted sum of theirs, each standardised within its group, so that a part with large
        numbers does not drown the others; else they are those of the total.
    over_batch: whether that sum is standardised once more, over all pictures that are trained on (GDPO, arXiv 2601.05242). Constraints come after it:
        their weights are against advantages of spread 1.
    constraints: maximise the above subject to `J <= budget` for each: `A = A_utility - sum of weight(J - budget) A_cost`.
    """

    parts: dict[str, Weight] = field(default_factory=dict)
    over_batch: bool = False
    constraints: tuple[Constraint, ...] = ()
    lagrangian: AugmentedLagrangian = field(default_factory=AugmentedLagrangian)

    def worth(
        self,
        memory: State,
        scores: Scores,
        prompts: Sequence[Prompt],
        group: int,
        floor: float,
        clip: float,
        least_spread: float,
        slack: float | Tensor,
        baseline: Baseline = own_group,
    ) -> tuple[Advantages, dict[str, float]]:
        """Advantages `(B,)` of B pictures in groups of `group`, and what there is to log; the multipliers in `memory` move.

        Where the Lagrangian is not normalised as a whole, a cost's advantage is centred in its group and not standardised: averaged over all
        pictures it is the gradient of the mean cost, times the share of pictures that the constraint is about (which the multiplier makes up
        for), so that a multiplier means the same for a group that is half unsafe and one with a single unsafe picture. A group is dead when
        neither utility nor any weighted cost spreads in it.
        """
        if not self.constraints:
            gain = self._utility_advantages(scores, prompts, group, floor, clip, least_spread, slack, baseline)
            return gain, reward_metrics(prompts, scores, gain)
        weight, noted = self._observe(memory, {i: self._mean(i, scores, prompts) for i, c in enumerate(self.constraints) if c.cost != "kl"})
        if self.lagrangian.normalise == "together":
            gain = advantages(self.utility(memory, scores, prompts), group, floor, clip, least_spread, slack, baseline)
            return gain, reward_metrics(prompts, scores, gain) | noted
        gain = self._utility_advantages(scores, prompts, group, floor, clip, least_spread, slack, baseline)
        value, alive = gain.value, gain.alive
        for i, constraint in enumerate(self.constraints):
            if constraint.cost == "kl" or not weight[i]:
                continue
            cost = self._cost(i, scores) * mask(prompts, constraint.about, scores.total.device)
            centred = (cost - cost.view(-1, group).mean(1).repeat_interleave(group)) * float(weight[i])
            value, alive = value - centred, alive | (centred.view(-1, group).abs().amax(1) >= least_spread)
        gain = Advantages(value, alive)
        return gain, reward_metrics(prompts, scores, gain) | noted

    def utility(self, memory: State, scores: Scores, prompts: Sequence[Prompt]) -> Tensor:
        """`(B,)`, differentiable: the total less `weight * cost`, at the weights of this rollout. Its mean has the gradient of the augmented
        Lagrangian, a cost's times the share of pictures that the constraint is about."""
        value, device = scores.total, scores.total.device
        if not self.constraints:
            return value
        weight = self._weight(memory)
        for i, constraint in enumerate(self.constraints):
            if constraint.cost != "kl":
                value = value - float(weight[i]) * self._cost(i, scores) * mask(prompts, constraint.about, device)
        return value

    def pull(self, memory: State) -> float:
        """What a constraint on "kl" adds to the weight of the KL in this iteration."""
        return sum(float(weight) for weight, constraint in zip(self._weight(memory), self.constraints, strict=True) if constraint.cost == "kl")

    def observe_kl(self, memory: State, kl: float) -> dict[str, float]:
        """The mean KL of an iteration moves the multiplier of a constraint on it; what there is to log."""
        bounded = {i: kl for i, constraint in enumerate(self.constraints) if constraint.cost == "kl"}
        return self._observe(memory, bounded)[1] if bounded else {}

    @property
    def bounds_kl(self) -> bool:
        """Whether a constraint needs the distance from the base, which an algorithm would not measure without any weight on it."""
        return any(constraint.cost == "kl" for constraint in self.constraints)

    @property
    def bounds_drift(self) -> bool:
        """Whether a constraint needs the pictures that the base paints from the same noise."""
        return any(constraint.cost == DRIFT for constraint in self.constraints)

    def _utility_advantages(
        self, scores: Scores, prompts: Sequence[Prompt], group: int, floor: float, clip: float, least_spread: float, slack: float | Tensor, baseline: Baseline
    ) -> Advantages:
        if not self.parts:
            return advantages(scores.total, group, floor, clip, least_spread, slack, baseline)
        value, alive = torch.zeros_like(scores.total, dtype=torch.float32), None
        for name, weight in self.parts.items():
            own = advantages(part(scores, name), group, floor, clip, least_spread, slack, baseline, name)
            counts = mask(prompts, weight.prompts, value.device)
            value = value + weight.value * own.value * counts
            here = own.alive & counts.view(-1, group)[:, 0].bool()
            alive = here if alive is None else alive | here
        if self.over_batch:
            value = _standardised(value, alive.repeat_interleave(group))
        return Advantages(value.clamp(-clip, clip), alive)

    def _cost(self, index: int, scores: Scores) -> Tensor:
        constraint = self.constraints[index]
        value = part(scores, constraint.cost)
        return value if constraint.at == "most" else -value

    def _mean(self, index: int, scores: Scores, prompts: Sequence[Prompt]) -> float | None:
        """The mean cost of the pictures that the constraint is about; None where this rollout has none of them."""
        counts = mask(prompts, self.constraints[index].about, scores.total.device)
        return float((self._cost(index, scores) * counts).sum() / counts.sum()) if counts.any() else None

    def _observe(self, memory: State, costs: dict[int, float | None]) -> tuple[Tensor, dict[str, float]]:
        """Smooth the costs, take the weights they ask for, and move the multipliers. Returns the weights `(C,)` and what to log."""
        state, cost = self._recall(memory)
        seen = torch.zeros(len(self.constraints), dtype=torch.bool)
        for index, value in costs.items():
            if value is not None:
                smooth = self.constraints[index].smooth
                cost[index] = value if cost[index].isnan() else smooth * cost[index] + (1 - smooth) * value
                seen[index] = True
        g = self._violation(cost)
        weight, moved = self.lagrangian.answer(g, state)
        memory |= {_STATE + name: torch.where(seen, moved[name], value) for name, value in state.items()}
        memory |= {_STATE + "cost": cost, _STATE + "weight": torch.where(seen, weight, self._weight(memory))}
        noted = {}
        for i, constraint in enumerate(self.constraints):
            if seen[i]:
                observed = cost[i] if constraint.at == "most" else -cost[i]
                names = {"cost": observed, "budget": constraint.budget, "multiplier": moved["lam"][i], "weight": weight[i], "rho": moved["rho"][i]}
                noted |= {f"constraint/{constraint.cost}/{name}": float(value) for name, value in names.items()}
        return weight, noted

    def _weight(self, memory: State) -> Tensor:
        """The weights that the last observation asked for, `(C,)`: what was logged is what is used."""
        return memory.get(_STATE + "weight", torch.zeros(len(self.constraints), dtype=torch.float64))

    def _recall(self, memory: State) -> tuple[State, Tensor]:
        count = len(self.constraints)
        state = {name: memory.get(_STATE + name, value) for name, value in self.lagrangian.start(count).items()}
        return state, memory.get(_STATE + "cost", torch.full((count,), torch.nan, dtype=torch.float64)).clone()

    def _violation(self, cost: Tensor) -> Tensor:
        """`J - budget`, `(C,)`; 0 where nothing was observed yet."""
        budget = torch.tensor([c.budget if c.at == "most" else -c.budget for c in self.constraints], dtype=torch.float64)
        return torch.where(cost.isnan(), 0.0, cost - budget)


def _standardised(value: Tensor, alive: Tensor) -> Tensor:
    """`(A - mean) / (std + 1e-4)` over the living pictures, as GDPO's code has it; 0 for the others, which nobody trains on."""
    living = value[alive]
    return torch.where(alive, (value - living.mean()) / (living.std() + 1e-4), 0.0) if len(living) else value


def part(scores: Scores, name: str) -> Tensor:
    """A part of the scores by name, or the "total". Raises UserError with the names there are."""
    if name == "total":
        return scores.total
    if name not in scores.parts:
        raise UserError(f"the reward has no part {name!r}; its parts are {', '.join(['total', *scores.parts])}")
    return scores.parts[name]
