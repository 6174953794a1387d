"""Painted trajectories, scored step by step by the policy as it stands: what methods with log-probabilities train on.

docs/method.md sections 3 and 4. Log-ratios and KLs are per latent dimension, so that no setting depends on the picture's size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from safediffusion import ranks
from safediffusion.algorithms.advantages import Advantages
from safediffusion.algorithms.card import require_noise
from safediffusion.algorithms.update import Learner
from safediffusion.errors import UserError
from safediffusion.rollout import Rollout
from safediffusion.types import Process

TrainGuidance = Literal["off", "both", "stop"]
RATIO_METRICS = ("loss", "kl", "ratio/distance", "ratio/clipped")  # of `policy_gradient`
# The losses of an update on a rollout and what its pictures are worth `(B,)`, micro-batch by micro-batch. They add to the last argument the
# sums of what there is to log, "kl" among them, and at its end how many were summed.
Losses = Callable[[Rollout, Tensor, Tensor], Iterator[Tensor]]


class Denoising(Protocol):
    """The settings that these methods share; what each means stands beside its default in the method's own file."""

    kind: str
    prompts: int
    group: int
    updates: int
    train_guidance: TrainGuidance
    train_steps: int
    drop_last: int
    normalise_ratio: bool
    benign_kl: float
    unsafe_kl: float


@dataclass(frozen=True)
class Moment:
    """The pictures `part` of this process's in one trained step. All are `(b,)`, per latent dimension, with gradient.

    log_ratio: log p of the step under the policy, less that under the one that sampled it; its value is 0 before the first update.
    above_base: the same, less that under the base. It is 0 where the base was not asked, and so is the KL.
    pull: the KL to the base, weighted as `Learner.pull` says.
    """

    part: slice
    log_ratio: Tensor
    above_base: Tensor
    kl: Tensor
    pull: Tensor


def check_denoising(algorithm: Denoising, recipe: Any) -> None:
    """Raises UserError for a recipe that leaves no step or no group to train."""
    require_noise(recipe.process, algorithm.kind)
    noisy = recipe.process.steps - 1
    if algorithm.drop_last >= noisy:
        raise UserError(f"algorithm.drop_last = {algorithm.drop_last} leaves none of the {noisy} stochastic steps to train; lower it")
    check_updates(algorithm)


def check_updates(algorithm: Denoising) -> None:
    """Raises UserError for more updates than there are groups."""
    if algorithm.updates > algorithm.prompts:
        raise UserError(f"algorithm.updates = {algorithm.updates} is more than the {algorithm.prompts} groups there are to share out")


def check_ratio(algorithm: Denoising, recipe: Any) -> None:
    """Raises UserError for several updates on pictures whose sampler, the guided policy, is not what is trained: no ratio would say how far it has moved."""
    if algorithm.updates > 1 and algorithm.train_guidance == "off" and recipe.process.guidance != 1:
        raise UserError(
            f"algorithm.updates = {algorithm.updates} are held together by the ratio to the policy that painted, and with process.guidance = {recipe.process.guidance:g} "
            'and algorithm.train_guidance = "off" there is none; set updates = 1, guidance = 1, or train_guidance = "both"'
        )


def shuffled(gain: Advantages, group: int, generator: torch.Generator) -> Tensor:
    """Indices of the pictures of living groups, `(G, K)` long on the CPU, the groups in a random order."""
    alive = gain.members(group).view(-1, group)
    return alive[torch.randperm(len(alive), generator=generator)]


def trained_steps(algorithm: Denoising, process: Process, drop_last: int, generator: torch.Generator) -> tuple[int, ...]:
    """Those of the noisy steps that this iteration trains."""
    noisy = process.stochastic_steps[: len(process.stochastic_steps) - drop_last]
    if not 0 < algorithm.train_steps < len(noisy):
        return noisy
    return tuple(noisy[i] for i in sorted(torch.randperm(len(noisy), generator=generator)[: algorithm.train_steps].tolist()))


def asks_base(algorithm: Denoising, learner: Learner) -> bool:
    """Whether the KL to the base is measured: where it has a weight, or could get one from a constraint."""
    return bool(algorithm.benign_kl or algorithm.unsafe_kl or learner.objective.bounds_kl)


def moments(algorithm: Denoising, learner: Learner, process: Process, steps: tuple[int, ...], rolled: Rollout, against_base: bool, whole: int = 1) -> Iterator[Moment]:
    """Each trained step of this process's pictures, at most `learner.batch` at a time, but never less than `whole` that belong together."""
    policy, device, ask = learner.policy, rolled.walk.clean.device, int(against_base)
    weights = learner.pull(torch.tensor([p.unsafe for p in rolled.prompts], device=device), algorithm.benign_kl, algorithm.unsafe_kl)[rolled.mine]
    parts = learner.parts(len(rolled.mine), whole)
    for step in steps:
        x, x_next, old = rolled.walk.states[step], rolled.walk.states[step + 1], rolled.walk.log_probs[step]
        dimensions = x.shape[1:].numel()
        guidance = learner.guidance if algorithm.train_guidance != "off" and process.guides(step) else 1.0
        sampled = learner.guidance if process.guides(step) else 1.0
        stop = algorithm.train_guidance == "stop"
        scale = 1 / process.sensitivity(step) if algorithm.normalise_ratio else 1.0
        for part in parts:
            time = torch.full((len(x[part]),), process.times[step].item(), dtype=process.times.dtype, device=device)
            kernel = process.kernel(policy.predict(x[part], time, rolled.condition[part], guidance, stop), x[part], step)
            log_prob = kernel.log_prob(x_next[part])
            # Without guidance in training the sampler is another policy; its ratio starts at 1 by definition.
            before = old[part] if guidance == sampled else log_prob.detach()
            kl = above_base = torch.zeros_like(log_prob)
            if ask:
                with torch.no_grad(), policy.reference():
                    base = process.kernel(policy.predict(x[part], time, rolled.condition[part], guidance), x[part], step)
                kl = kernel.kl(base) / dimensions * scale**2
                above_base = (log_prob - base.log_prob(x_next[part])) / dimensions * scale
            learner.forwards += len(log_prob) * (3 + ask + (0 if guidance == 1 else (1 if stop else 3) + ask))
            yield Moment(part, (log_prob - before) / dimensions * scale, above_base, kl, weights[part] * kl)


def policy_gradient(algorithm: Denoising, learner: Learner, process: Process, steps: tuple[int, ...], clip_range: float | None) -> Losses:
    """The clipped ratio of PPO (arXiv 1707.06347, equation 7), `max(-A rho, -A clip(rho, 1 - eps, 1 + eps))`, and the pull to the base.

    Without `clip_range` it is the score function, `-A log rho`: its gradient is that of `-A log p`. Means over pictures and steps.
    """
    against_base = asks_base(algorithm, learner)

    def losses(rolled: Rollout, gain: Tensor, totals: Tensor) -> Iterator[Tensor]:
        gain, share = gain[rolled.mine], 1 / (len(rolled) * len(steps))
        for moment in moments(algorithm, learner, process, steps, rolled, against_base):
            worth, ratio = gain[moment.part], moment.log_ratio.exp()
            distance = (ratio.detach() - 1).abs()
            if clip_range is None:
                loss, clipped = -worth * moment.log_ratio, torch.zeros_like(distance)
            else:
                loss, clipped = torch.maximum(-worth * ratio, -worth * ratio.clamp(1 - clip_range, 1 + clip_range)), (distance > clip_range).float()
            totals += torch.stack([each.sum() for each in (loss.detach(), moment.kl.detach(), distance, clipped, torch.ones_like(clipped))])
            yield (loss + moment.pull).sum() * share

    return losses


def update_by_groups(algorithm: Denoising, learner: Learner, rolled: Rollout, gain: Tensor, groups: Tensor, losses: Losses, names: tuple[str, ...]) -> dict[str, float]:
    """Updates that share out the `groups` of indices `(G, K)`; what there is to log, by `names`."""
    totals = torch.zeros(len(names) + 1, device=gain.device)  # stays there until the last update
    norms = []
    for few in groups.tensor_split(min(algorithm.updates, len(groups))) if len(groups) else ():
        index = few.flatten()
        norms.append(learner.descend(losses(rolled[index], gain[index.to(gain.device)], totals)))
    *sums, count = ranks.summed(totals).tolist()
    metrics = {name: value / max(count, 1.0) for name, value in zip(names, sums, strict=True)}
    metrics |= learner.observe_kl(metrics["kl"]) if norms else {}
    return metrics | {"grad_norm": sum(norms) / len(norms) if norms else 0.0}
