"""Up the gradient of the reward itself, through decoder and denoiser: what methods of direct back-propagation share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from safediffusion import ranks
from safediffusion.algorithms.card import require_units
from safediffusion.algorithms.noising import Pictures, base, noised, said
from safediffusion.algorithms.objective import part as part_of
from safediffusion.algorithms.update import Learner
from safediffusion.errors import UserError
from safediffusion.rewards.scores import check_gradient
from safediffusion.rollout import DRIFT, Rollout, chunks, with_drift
from safediffusion.types import Prompt

# Of the M pictures of this process those of a slice, as clean latents (n, C, h, w) that gradients flow through; each time one more look at them.
Paint = Callable[[slice], Iterator[Tensor]]


class Climbing(Protocol):
    """The settings that these methods share; what each means stands beside its default in the method's own file."""

    kind: str
    group: int
    recompute: bool
    times: int
    time_range: tuple[float, float]
    benign_kl: float
    unsafe_kl: float


def check_climbing(algorithm: Climbing, recipe: Any, unfinished: str = "") -> None:
    """Raises UserError for a recipe whose reward or constraints have no gradient to follow.

    unfinished: in words, with the fix, that pictures are scored which the rollout did not finish: the base has none to compare them with. "" where there are none.
    """
    reward, kind = recipe.reward, algorithm.kind
    if not reward.differentiable:
        raise UserError(f"algorithm.kind = '{kind}' follows the gradient of the reward, and this one of kind '{reward.kind}' has none; use algorithm.kind = 'forward'")
    require_units(reward, f"algorithm.kind = '{kind}' has none")
    if unfinished and any(constraint.cost == DRIFT for constraint in recipe.constraints):
        raise UserError(f'a constraint on "drift" compares finished pictures with those of the base, and {unfinished}')
    flows = {"kl": True, "total": True} | ({} if unfinished else {DRIFT: True}) | (reward.measures or {})
    for index, constraint in enumerate(recipe.constraints):
        if not flows.get(constraint.cost, True):
            known = ", ".join(name for name, has in flows.items() if has)
            raise UserError(f"constraints.{index}.cost = {constraint.cost!r} has no gradient, which algorithm.kind = '{kind}' needs; constrain one of {known}")
    if recipe.process.solver != "ddim":
        raise UserError(
            f"algorithm.kind = '{kind}' goes back through single steps, and process.solver = '{recipe.process.solver}' joins two; set process.solver = 'ddim'"
        )


def walked(algorithm: Climbing, learner: Learner, prompts: Sequence[Prompt], generator: torch.Generator) -> tuple[Rollout, dict[str, float]]:
    """The rollout with its states, and what there is to log of its scores. Constraints observe their cost here: their weights hold for this very update."""
    rolled = learner.paint(prompts, algorithm.group, generator, remember=True)
    # Nothing is compared, so no group is dead; the advantages are not used.
    _, metrics = learner.worth(rolled, floor=1.0, clip=1.0, least_spread=0.0)
    return rolled, metrics


def step_back(algorithm: Climbing, learner: Learner, rolled: Rollout, part: slice, x: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """One denoising step as the rollout took it, differentiable: the next latent and x0^, both `(n, C, h, w)`.

    With guidance the gradient flows through both branches. Recomputing is not counted, as that of `policy.gradient_checkpointing` is not.
    """
    process = learner.process
    time = torch.full((len(x),), process.times[step].item(), dtype=process.times.dtype, device=x.device)
    guidance = learner.guidance if process.guides(step) else 1.0
    learner.forwards += 3 * len(x) * (1 if guidance == 1 else 2)
    arguments = (x, time, rolled.condition[part], guidance)
    predict = learner.policy.predict
    output = checkpoint(predict, *arguments, use_reentrant=False) if algorithm.recompute else predict(*arguments)
    after, x0 = process.advance(output, x, step, None)
    if step in process.stochastic_steps:
        mean = process.kernel(output, x, step).mean
        after = mean + (rolled.walk.states[step + 1][part] - mean).detach()  # the noise that the rollout drew
    return after, x0


def ascend(algorithm: Climbing, learner: Learner, rolled: Rollout, paint: Paint, looks: int, generator: torch.Generator) -> dict[str, float]:
    """One update: up the mean utility of what `paint` gives in `looks` looks, and towards the base on the rollout's pictures made noisy again."""
    pictures, totals = Pictures.of(rolled, algorithm.group), torch.zeros(2, device=rolled.scores.total.device)
    pull = learner.pull(pictures.unsafe, algorithm.benign_kl, algorithm.unsafe_kl)[rolled.mine]

    followed = ("total", *(each.cost for each in learner.objective.constraints if each.cost not in ("kl", DRIFT)))

    def losses() -> Iterator[Tensor]:
        share = 1 / len(rolled)
        for part in chunks(len(rolled.mine), learner.batch):
            prompts = [rolled.prompts[i] for i in rolled.mine[part].tolist()]
            for clean in paint(part):
                scores = learner.reward(learner.policy.sketch(clean), prompts)
                for name in followed:
                    check_gradient(part_of(scores, name), f"the reward's {name}")
                if rolled.base is not None:
                    scores = with_drift(scores, clean, rolled.base[part], prompts)
                loss = -learner.utility(scores, prompts).sum() * share / looks
                totals[0] += loss.detach()
                yield loss
        for turn in range(algorithm.times):
            noisy = noised(algorithm, learner.process, pictures, turn, generator)
            for part in chunks(len(noisy), learner.batch):
                anchor, seen = base(learner, noisy[part]), said(learner, noisy[part])
                kl = (seen - anchor).square().mean(1)
                totals[1] += kl.detach().sum() * share / algorithm.times
                yield (pull[part] * kl).sum() * share / algorithm.times

    norm = learner.descend(losses())
    loss, kl = ranks.summed(totals).tolist()
    return learner.observe_kl(kl) | {"grad_norm": norm, "loss": loss, "kl": kl}
