"""Clean pictures made noisy again: what methods that need no log-probabilities paint, draw and descend on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import torch
from pydantic import Field
from torch import Tensor

from safediffusion import ranks
from safediffusion.algorithms.update import Learner
from safediffusion.errors import UserError
from safediffusion.rollout import Rollout
from safediffusion.types import Prompt

Guidance = Annotated[float, Field(ge=0, lt=math.inf)]


class Levels(Protocol):
    """The noise levels of a method: how many there are, and between which shares of the schedule."""

    times: int
    time_range: tuple[float, float]


class Renoising(Protocol):
    """The settings that these methods share; what each means stands beside its default in the method's own file."""

    prompts: int
    group: int
    times: int
    updates: int
    time_range: tuple[float, float]
    floor: float
    clip: float
    slack: float
    least_spread: float
    explore: tuple[float, float] | None
    benign_kl: float
    unsafe_kl: float


@dataclass(frozen=True)
class Pictures:
    """B clean latents, those of `group` neighbours of one prompt. On several processes `clean` and `condition` hold the M of this one."""

    clean: Tensor  # (M, C, h, w)
    condition: Tensor  # (M, L, D)
    mine: Tensor  # (M,) long, CPU: which of the B this process has
    unsafe: Tensor  # (B,) bool: whether its prompt is
    group: int

    @classmethod
    def of(cls, rolled: Rollout, group: int) -> Pictures:
        clean = rolled.walk.clean
        return cls(clean, rolled.condition, rolled.mine, torch.tensor([prompt.unsafe for prompt in rolled.prompts], device=clean.device), group)


@dataclass(frozen=True)
class Noisy:
    """M pictures at one noise level each: latents `x` (M, C, h, w), `time` (M,), the noise `wanted` of the network (M, D) and its condition."""

    x: Tensor
    time: Tensor
    condition: Tensor
    wanted: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, part: slice) -> Noisy:
        return Noisy(self.x[part], self.time[part], self.condition[part], self.wanted[part])


# What a method makes of pictures at a noise level, micro-batch by micro-batch: where it lies, the sum of its losses, and the KL (n,) of each picture.
Losses = Callable[[Noisy], Iterator[tuple[slice, Tensor, Tensor]]]


def check_noising(algorithm: Renoising) -> None:
    """Raises UserError for more updates than there are noise levels."""
    if algorithm.updates > algorithm.times:
        raise UserError(f"algorithm.updates = {algorithm.updates} is more than the {algorithm.times} times there are to share out")


def judged(algorithm: Renoising, learner: Learner, prompts: Sequence[Prompt], generator: torch.Generator) -> tuple[Rollout, Tensor, dict[str, float]]:
    """Paint and judge: the rollout of the living groups, what its pictures are worth `(B,)`, and what there is to log of all."""
    guidance: float | Tensor = learner.guidance
    if algorithm.explore is not None:
        spread = torch.linspace(*algorithm.explore, algorithm.group)
        guidance = torch.cat([spread if prompt.unsafe else torch.full_like(spread, learner.guidance) for prompt in prompts])
    rolled = learner.paint(prompts, algorithm.group, generator, guidance)
    gain, metrics = learner.worth(rolled, algorithm.floor, algorithm.clip, algorithm.least_spread, algorithm.slack)
    alive = gain.members(algorithm.group)
    return rolled[alive], gain.value[alive.to(gain.value.device)], metrics


def update_by_times(algorithm: Renoising, learner: Learner, pictures: Pictures, losses: Losses, generator: torch.Generator) -> dict[str, float]:
    """Updates that share out the noise levels, each on the mean of the losses and the pull to the base; what there is to log."""
    count = len(pictures.unsafe)
    if count == 0:
        return {"grad_norm": 0.0, "loss": 0.0, "kl": 0.0}
    pull = learner.pull(pictures.unsafe, algorithm.benign_kl, algorithm.unsafe_kl)[pictures.mine]
    totals, norms = torch.zeros(2, device=pull.device), []

    def summands(turns: list[int]) -> Iterator[Tensor]:
        share = 1 / (count * len(turns))
        for turn in turns:
            for part, loss, kl in losses(noised(algorithm, learner.process, pictures, turn, generator)):
                totals.add_(torch.stack([loss.detach(), kl.detach().sum()]) * share)
                yield (loss + (pull[part] * kl).sum()) * share

    for turns in torch.randperm(algorithm.times, generator=generator).tensor_split(algorithm.updates):
        norms.append(learner.descend(summands(turns.tolist())))
    loss, kl = (ranks.summed(totals) / len(norms)).tolist()
    return learner.observe_kl(kl) | {"grad_norm": sum(norms) / len(norms), "loss": loss, "kl": kl}


def noised(algorithm: Levels, process: Any, pictures: Pictures, turn: int, generator: torch.Generator) -> Noisy:
    """The pictures at a noise level. Members of a group share time and noise, so that their common error cancels where they are compared.

    Times are stratified: turn i of n draws from the i-th n-th of the range.
    """
    clean, mine, group = pictures.clean, pictures.mine, pictures.group
    groups, (low, high) = len(pictures.unsafe) // group, algorithm.time_range
    place = (turn + torch.rand(groups, generator=generator)) / algorithm.times
    time = process.time_at(low + (high - low) * place).repeat_interleave(group)[mine].to(clean.device)
    noise = torch.randn((groups, *clean.shape[1:]), generator=generator).repeat_interleave(group, 0)[mine].to(clean.device)
    x, target = process.noised(clean, noise, time)
    return Noisy(x, time, pictures.condition, process.to_epsilon(target, x, time).flatten(1))


def said(learner: Learner, noisy: Noisy, guidance: float = 1.0) -> Tensor:
    """The noise that the policy sees, `(n, D)`."""
    learner.forwards += len(noisy) * (3 if torch.is_grad_enabled() else 1 if guidance == 1 else 2)
    output = learner.policy.predict(noisy.x, noisy.time, noisy.condition, guidance)
    return learner.process.to_epsilon(output, noisy.x, noisy.time).flatten(1)


def base(learner: Learner, noisy: Noisy, guidance: float = 1.0) -> Tensor:
    """The noise that the base model sees, `(n, D)`."""
    with torch.no_grad(), learner.policy.reference():
        return said(learner, noisy, guidance)


def error(seen: Tensor, noisy: Noisy) -> Tensor:
    """Mean squared error of the noise, over dimensions, `(n,)`."""
    return (seen - noisy.wanted).square().mean(1)


def weighted(learner: Learner, weight: Tensor) -> Losses:
    """`weight` (M,) times the denoising error."""

    def losses(noisy: Noisy) -> Iterator[tuple[slice, Tensor, Tensor]]:
        for part in learner.parts(len(noisy)):
            few = noisy[part]
            anchor, seen = base(learner, few), said(learner, few)
            yield part, (weight[part] * error(seen, few)).sum(), (seen - anchor).square().mean(1)

    return losses
