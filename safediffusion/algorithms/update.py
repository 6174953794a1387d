"""What every algorithm shares: whole groups, centred advantages, one optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor

from safediffusion import ranks
from safediffusion.errors import UserError
from safediffusion.types import Policy, Process, Prompt, Reward, Scores


@dataclass
class Learner:
    """The policy with all that is needed to move it. The only mutable thing an algorithm gets."""

    policy: Policy
    process: Process
    reward: Reward
    optimizer: torch.optim.Optimizer
    accelerator: Accelerator
    parameters: tuple[torch.nn.Parameter, ...]
    guidance: float = 1.0
    batch: int = 0  # images per forward; 0 is all at once
    max_grad_norm: float = 1.0
    averaged: Callable[[], AbstractContextManager[None]] = nullcontext  # inside, the parameters are their moving average
    iteration: int = 0  # counted from 0
    updates: int = 0  # optimizer steps so far
    forwards: float = field(default=0.0)  # denoiser forwards of one image so far; a backward counts as two

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
        self.optimizer.step()
        self.updates += 1
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


@dataclass(frozen=True)
class Advantages:
    """`value` (B,) with groups of `group`; `alive` (P,) marks groups with enough spread to carry a signal."""

    value: Tensor
    alive: Tensor

    @property
    def dead_share(self) -> float:
        return 1 - float(self.alive.float().mean())

    def members(self, group: int) -> Tensor:
        """Indices (long, CPU) of the pictures of living groups."""
        return torch.arange(len(self.value))[self.alive.cpu().repeat_interleave(group)]


def advantages(total: Tensor, group: int, floor: float, clip: float, least_spread: float, slack: float | Tensor = 0.0) -> Advantages:
    """Per-prompt standardised scores `(r - mean) / (std + floor)`, clipped to +-`clip` (docs/method.md section 4).

    Scores within `slack` of the best of their group count as equal; a tensor `(P,)` gives every group its own. A group whose scores then spread less than `least_spread`
    is dead: its advantages are zero and it should not be trained on.
    """
    grouped = total.float().view(-1, group)
    slack = torch.as_tensor(slack, dtype=grouped.dtype, device=grouped.device).reshape(-1, 1)
    grouped = torch.minimum(grouped, grouped.amax(1, keepdim=True) - slack)
    centred = grouped - grouped.mean(1, keepdim=True)
    spread = centred.square().mean(1, keepdim=True).sqrt()
    alive = spread[:, 0] >= least_spread
    value = (centred / (spread + floor)).clamp(-clip, clip) * alive[:, None]
    return Advantages(value.flatten(), alive)


def unlikeness(scores: Scores, group: int, slack: float) -> Tensor:
    """How much more unlike the other good pictures of its group each good picture is than they are, `(B,)`: 0 for the rest.

    Good are those within `slack` of the best score of their group; the measure is the mean cosine distance of the reward's
    embeddings, less its mean. Not standardised: as an advantage it is then the gradient of the mean distance, so that prompts that
    leave much open count for more than those that leave nothing. Raises UserError for a reward that gives no embeddings.
    """
    if scores.embedding is None:
        raise UserError("algorithm.diversity needs the embeddings of a reward's encoder, and this reward gives none (Scores.embedding); set it to 0")
    seen, total = scores.embedding.float().view(-1, group, scores.embedding.shape[1]), scores.total.float().view(-1, group)
    good = total >= total.amax(1, keepdim=True) - slack
    count = good.sum(1, keepdim=True)
    others = good[:, None, :] & ~torch.eye(group, dtype=torch.bool, device=good.device)
    distance = ((1 - seen @ seen.mT) * others).sum(2) / (count - 1).clamp(min=1)
    return ((distance - (distance * good).sum(1, keepdim=True) / count) * good).flatten()


def reward_metrics(prompts: Sequence[Prompt], scores: Scores, gain: Advantages) -> dict[str, float]:
    """Mean scores of a rollout: the total, its parts, and the total of each prompt class that occurs."""
    unsafe = torch.tensor([prompt.unsafe for prompt in prompts], device=scores.total.device)
    measured = {"total": scores.total, **scores.parts, "benign": scores.total[~unsafe], "unsafe": scores.total[unsafe]}
    return {f"reward/{name}": float(value.mean()) for name, value in measured.items() if len(value)} | {"dead_groups": gain.dead_share}


def class_weights(unsafe: Tensor, benign_weight: float, unsafe_weight: float) -> Tensor:
    """A weight per picture by the class of its prompt, `(B,)`."""
    return torch.where(unsafe, unsafe_weight, benign_weight)
