"""How many denoiser forwards an iteration of a recipe takes: the predicted growth of `Learner.forwards`, to the last one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from safediffusion.algorithms.d3po import D3po
from safediffusion.algorithms.ddpo import Ddpo
from safediffusion.algorithms.dpo import Dpo
from safediffusion.algorithms.dpok import Dpok
from safediffusion.algorithms.draft import Draft
from safediffusion.algorithms.forward import Forward
from safediffusion.algorithms.grpo import Grpo
from safediffusion.algorithms.kto import Kto
from safediffusion.algorithms.noising import Renoising
from safediffusion.algorithms.raft import Raft
from safediffusion.algorithms.refl import Refl
from safediffusion.algorithms.rwr import Rwr
from safediffusion.algorithms.trajectory import Denoising
from safediffusion.recipe import Recipe
from safediffusion.rollout import DRIFT
from safediffusion.types import Process


@dataclass(frozen=True)
class Forwards:
    """Forwards of one image through the denoiser in one iteration, with every group alive; guidance doubles a forward.

    Not whole where unsafe prompts are not equally many in each iteration, or the steps to train are drawn: it is then their mean.
    """

    images: int
    rollout: float  # painting, without a graph
    trained: float  # with a graph, one backward each
    reference: float  # of the frozen base, while training

    @property
    def training(self) -> float:
        """A backward counts as two forwards, as `Learner.forwards` counts it."""
        return 3 * self.trained + self.reference

    @property
    def counted(self) -> float:
        return self.rollout + self.training

    @property
    def per_image(self) -> float:
        return self.counted / self.images


def forwards(recipe: Recipe, unsafe: int | None = None, process: Process | None = None) -> Forwards | None:
    """Those of one iteration of `recipe`, in which `unsafe` prompts are unsafe; None for an algorithm that has no count here.

    Dead groups are painted and not trained on, which nobody knows beforehand: with them it is an upper bound. In which steps
    guidance acts, and where a random window lies, is known from `process` alone; without it the times are taken to be even, and
    a window to lie at its start.
    """
    count = _COUNTS.get(type(recipe.algorithm))
    if count is None:
        return None
    guided = [process.guides(step) for step in range(recipe.process.steps)] if process else _guided(recipe)
    unsafe = _unsafe(recipe) if unsafe is None else unsafe
    counted = count(recipe, recipe.algorithm, unsafe, guided)
    return replace(counted, rollout=counted.rollout + _by_base(recipe, unsafe, guided))


def _by_base(recipe: Recipe, unsafe: float, guides: list[bool]) -> float:
    """What the base paints of benign prompts for a constraint on the drift."""
    if not any(constraint.cost == DRIFT for constraint in recipe.constraints):
        return 0.0
    algorithm, branches = recipe.algorithm, _branches(recipe, guides)
    shared = _shared(algorithm) if isinstance(algorithm, Grpo) else 0
    return (algorithm.prompts - unsafe) * (sum(branches[:shared]) + algorithm.group * sum(branches[shared:]))


def _forward(recipe: Recipe, algorithm: Forward, unsafe: float, guides: list[bool]) -> Forwards:
    images, painted = algorithm.prompts * algorithm.group, _painted(recipe, algorithm, unsafe, guides)
    trained = algorithm.times * images
    reference = (1 if algorithm.anchor_guidance == 1 else 2) + (algorithm.old != "now")
    return Forwards(images, painted, trained, trained * reference)


def _rwr(recipe: Recipe, algorithm: Rwr, unsafe: float, guides: list[bool]) -> Forwards:
    images = algorithm.prompts * algorithm.group
    return Forwards(images, _painted(recipe, algorithm, unsafe, guides), algorithm.times * images, algorithm.times * images)


def _raft(recipe: Recipe, algorithm: Raft, unsafe: float, guides: list[bool]) -> Forwards:
    trained = algorithm.times * algorithm.prompts  # one picture of each group
    return Forwards(algorithm.prompts * algorithm.group, _painted(recipe, algorithm, unsafe, guides), trained, trained)


def _dpo(recipe: Recipe, algorithm: Dpo, unsafe: float, guides: list[bool]) -> Forwards:
    painted = 0.0 if algorithm.dataset else _painted(recipe, algorithm, unsafe, guides)
    trained = algorithm.times * algorithm.prompts * (2 if algorithm.pairs == "extremes" else algorithm.group)
    return Forwards(algorithm.prompts * algorithm.group, painted, trained, trained)


def _kto(recipe: Recipe, algorithm: Kto, unsafe: float, guides: list[bool]) -> Forwards:
    images = algorithm.prompts * algorithm.group
    trained = algorithm.times * images
    return Forwards(images, _painted(recipe, algorithm, unsafe, guides), trained, 2 * trained)  # base and policy, for the reference point


def _painted(recipe: Recipe, algorithm: Renoising, unsafe: float, guides: list[bool]) -> float:
    """The rollout of the methods on clean pictures, which may spread the guidance of unsafe prompts."""
    group = algorithm.group
    images = algorithm.prompts * group
    guided: float = images if recipe.process.guidance != 1 else 0
    if algorithm.explore is not None:
        strengths = torch.linspace(*algorithm.explore, group)  # as the algorithm draws them: rounding decides which are exactly 1
        guided = guided / images * (algorithm.prompts - unsafe) * group + unsafe * int((strengths != 1).sum())
    return images * recipe.process.steps + guided * sum(guides)


def _grpo(recipe: Recipe, algorithm: Grpo, unsafe: float, guides: list[bool]) -> Forwards:
    images, window = algorithm.prompts * algorithm.group, algorithm.window
    branches = _branches(recipe, guides)
    shared = _shared(algorithm)
    painted = sum(branches[:shared]) * algorithm.prompts + sum(branches[shared:]) * images
    # The last step has no noise.
    noisy = range(window.start, window.start + window.length) if window else range(recipe.process.steps - 1 - algorithm.drop_last)
    return _walked_again(algorithm, images, painted, images, [branches[step] for step in noisy], _asks_base(recipe, algorithm))


def _shared(algorithm: Grpo) -> int:
    """Steps that the pictures of a prompt walk together."""
    return algorithm.window.start if algorithm.window and algorithm.share_prefix else 0


def _denoising(recipe: Recipe, algorithm: Ddpo | Dpok, unsafe: float, guides: list[bool]) -> Forwards:
    images, branches = algorithm.prompts * algorithm.group, _branches(recipe, guides)
    noisy = branches[: recipe.process.steps - 1 - algorithm.drop_last]
    return _walked_again(algorithm, images, images * sum(branches), images, noisy, _asks_base(recipe, algorithm))


def _d3po(recipe: Recipe, algorithm: D3po, unsafe: float, guides: list[bool]) -> Forwards:
    images, branches = algorithm.prompts * algorithm.group, _branches(recipe, guides)
    noisy = branches[: recipe.process.steps - 1 - algorithm.drop_last]
    trained = 2 * algorithm.prompts if algorithm.pairs == "extremes" else images
    return _walked_again(algorithm, images, images * sum(branches), trained, noisy, True)


def _asks_base(recipe: Recipe, algorithm: Denoising) -> bool:
    return bool(algorithm.benign_kl or algorithm.unsafe_kl) or any(constraint.cost == "kl" for constraint in recipe.constraints)


def _walked_again(algorithm: Denoising, images: int, painted: float, trained: int, noisy: list[int], against_base: bool) -> Forwards:
    """Forwards of methods with log-probabilities, which train `trained` pictures in steps out of the `noisy`, whose branches these are."""
    steps = min(algorithm.train_steps or len(noisy), len(noisy))
    second = sum(each - 1 for each in noisy) / len(noisy) * steps if algorithm.train_guidance != "off" else 0  # unconditional branches
    graphs = steps + (second if algorithm.train_guidance == "both" else 0)
    base = steps + second if against_base else 0
    return Forwards(images, painted, trained * graphs, trained * (base + (second if algorithm.train_guidance == "stop" else 0)))


def _draft(recipe: Recipe, algorithm: Draft, unsafe: float, guides: list[bool]) -> Forwards:
    last = [algorithm.last] if algorithm.truncate == "fixed" else range(1, algorithm.last + 1)
    branches = _branches(recipe, guides)
    steps = sum(sum(branches[-each:]) for each in last) / len(last) + algorithm.copies * branches[-1]
    return _climbing(recipe, algorithm, steps, branches)


def _refl(recipe: Recipe, algorithm: Refl, unsafe: float, guides: list[bool]) -> Forwards:
    branches = _branches(recipe, guides)
    late = branches[-max(1, round(algorithm.late * len(branches))) :]
    return _climbing(recipe, algorithm, sum(late) / len(late), branches)


def _climbing(recipe: Recipe, algorithm: Draft | Refl, steps: float, branches: list[int]) -> Forwards:
    """`steps` are those of the walk with a graph; the pull to the base has its own."""
    images = algorithm.prompts * algorithm.group
    return Forwards(images, images * sum(branches), images * (steps + algorithm.times), images * algorithm.times)


def _branches(recipe: Recipe, guides: list[bool]) -> list[int]:
    """Forwards of each step of the walk."""
    return [2 if on and recipe.process.guidance != 1 else 1 for on in guides]


def _guided(recipe: Recipe) -> list[bool]:
    """Whether guidance acts in each step of an even grid, as Stable Diffusion's is: each lies just above its share of the schedule."""
    low, high = recipe.process.guidance_range
    steps = recipe.process.steps
    return [low <= step / steps < high for step in reversed(range(steps))]


_COUNTS: dict[type, Callable[[Recipe, Any, float, list[bool]], Forwards]] = {
    Forward: _forward,
    Grpo: _grpo,
    Ddpo: _denoising,
    Dpok: _denoising,
    D3po: _d3po,
    Rwr: _rwr,
    Raft: _raft,
    Dpo: _dpo,
    Kto: _kto,
    Draft: _draft,
    Refl: _refl,
}


def _unsafe(recipe: Recipe) -> float:
    """Unsafe prompts of an iteration, on average."""
    if not recipe.data.safe or not recipe.data.unsafe:
        return recipe.algorithm.prompts if recipe.data.unsafe else 0
    return recipe.algorithm.prompts * recipe.data.unsafe_share
