"""What every algorithm is handed: the policy with all that moves it, and one optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor

from safediffusion import ranks
from safediffusion.algorithms.advantages import Advantages, Baseline, class_weights, own_group
from safediffusion.algorithms.objective import Objective
from safediffusion.rollout import Rollout, chunks, roll_out
from safediffusion.types import Policy, Process, Prompt, Reward, Scores


@dataclass
class Learner:
    """The policy with all that is needed to move it. The only mutable thing an algorithm gets."""

    policy: Policy
    process: Process
    reward: Reward | None  # None where nothing is painted
    optimizer: torch.optim.Optimizer
    accelerator: Accelerator
    parameters: tuple[torch.nn.Parameter, ...]
    guidance: float = 1.0
    batch: int = 0  # images per forward; 0 is all at once
    max_grad_norm: float = 1.0
    averaged: Callable[[], AbstractContextManager[None]] = nullcontext  # inside, the parameters are their moving average
    # Pairs of pictures that somebody has sorted, as clean latents (2P, C, h, w), the chosen first: of P prompts, by P draws in [0, 1).
    pairs: Callable[[Sequence[Prompt], Sequence[float]], Tensor] | None = None
    objective: Objective = field(default_factory=Objective)
    # What an algorithm or objective carries from one iteration to the next, by name: checkpoints hold it.
    memory: dict[str, Tensor] = field(default_factory=dict)
    iteration: int = 0  # counted from 0
    updates: int = 0  # optimizer steps so far
    forwards: float = field(default=0.0)  # denoiser forwards of one image so far; a backward counts as two

    def paint(
        self,
        prompts: Sequence[Prompt],
        group: int,
        generator: torch.Generator,
        guidance: float | Tensor | None = None,
        remember: bool = False,
        process: Process | None = None,
        share_prefix: bool = False,
    ) -> Rollout:
        """A rollout by the learner's own guidance and process where no others are given, its forwards counted; and against the base where a constraint asks."""
        guidance, process = self.guidance if guidance is None else guidance, process or self.process
        against_base = self.objective.bounds_drift
        rolled = roll_out(self.policy, process, self.reward, prompts, group, guidance, generator, remember, self.batch, share_prefix, against_base)
        self.forwards += rolled.forwards
        return rolled

    def parts(self, count: int, whole: int = 1) -> list[slice]:
        """Which of `count` pictures of this process go through the network together: at most `batch`, but never less than `whole` that belong together.

        Where processes hold the network together, each gets as many parts as any: one with fewer pictures ends with empty ones, whose loss
        and gradients are exactly 0. Then all processes must call this, and descend on every part.
        """
        own = chunks(count, self.batch and max(self.batch // whole, 1) * whole)
        return own + [slice(count, count)] * (max(ranks.gathered(len(own))) - len(own)) if self.policy.sharded else own

    def worth(
        self, rolled: Rollout, floor: float, clip: float, least_spread: float, slack: float = 0.0, baseline: Baseline = own_group
    ) -> tuple[Advantages, dict[str, float]]:
        """Advantages of a rollout under the objective, for every picture of all processes; and what there is to log of its scores.

        Once per rollout: constraints observe their cost here. The settings are those of `advantages`, `slack` of benign prompts alone:
        among pictures of an unsafe one the best is the aim.
        """
        slack = class_weights(torch.tensor([prompt.unsafe for prompt in rolled.prompts[:: rolled.group]]), slack, 0.0)
        return self.objective.worth(self.memory, rolled.scores, rolled.prompts, rolled.group, floor, clip, least_spread, slack, baseline)

    def utility(self, scores: Scores, prompts: Sequence[Prompt]) -> Tensor:
        """What direct back-propagation raises, `(B,)`, differentiable: the reward less what the constraints take off."""
        return self.objective.utility(self.memory, scores, prompts)

    def pull(self, unsafe: Tensor, benign_kl: float, unsafe_kl: float) -> Tensor:
        """The weight of each picture's KL, `(B,)`: by the class of its prompt, and what a constraint on the KL adds."""
        return class_weights(unsafe, benign_kl, unsafe_kl) + self.objective.pull(self.memory)

    def observe_kl(self, kl: float) -> dict[str, float]:
        """After an iteration: a constraint on the KL hears how large it was; what there is to log."""
        return self.objective.observe_kl(self.memory, kl)

    def descend(self, losses: Iterable[Tensor]) -> float:
        """Backward on each loss as it is yielded, then one clipped optimizer step; returns the gradient norm before clipping.

        The losses must sum, over all processes, to the loss of the whole batch: each process gives those of its own pictures,
        many or none, divided by what all have. One graph is in memory at a time. Raises FloatingPointError when the
        gradient is not finite, on every process; the parameters are then untouched.
        """
        self.optimizer.zero_grad(set_to_none=True)
        before = self.forwards
        for loss in losses:
            self.accelerator.backward(loss)
        # Once per update and by us, not by DDP's hooks: they average, and want as many backwards on each process.
        ranks.sum_gradients(self.parameters)
        self.forwards = before + float(ranks.summed(torch.tensor(self.forwards - before, dtype=torch.float64)))
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.max_grad_norm)
        norm = float(norm)
        if not norm < float("inf"):
            self.optimizer.zero_grad(set_to_none=True)
            raise FloatingPointError(f"the gradient norm is {norm}")
        self.updates += 1  # before the step: one that runs out of memory halfway has moved something, and is not to be repeated
        self.optimizer.step()
        return norm


@contextmanager
def holding(parameters: Sequence[torch.nn.Parameter], values: Sequence[Tensor]) -> Iterator[None]:
    """Inside, the parameters are `values`. No graph that holds them may be open."""
    kept = [parameter.detach().clone() for parameter in parameters]
    _assign(parameters, values)
    try:
        yield
    finally:
        _assign(parameters, kept)


@torch.no_grad()
def _assign(parameters: Sequence[torch.nn.Parameter], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
