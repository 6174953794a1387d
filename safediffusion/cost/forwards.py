"""How many denoiser forwards an iteration of a recipe takes: the predicted growth of `Learner.forwards`, to the last one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from safediffusion.algorithms.forward import Forward
from safediffusion.algorithms.grpo import Grpo
from safediffusion.recipe import Recipe
from safediffusion.types import Process


@dataclass(frozen=True)
class Forwards:
    """Forwards of one image through the denoiser in one iteration, with every group alive; guidance doubles a forward.

    Not whole where unsafe prompts are not equally many in each iteration: it is then their mean.
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
    return count(recipe, recipe.algorithm, _unsafe(recipe) if unsafe is None else unsafe, guided)


def _forward(recipe: Recipe, algorithm: Forward, unsafe: float, guides: list[bool]) -> Forwards:
    images, group = algorithm.prompts * algorithm.group, algorithm.group
    guided: float = images if recipe.process.guidance != 1 else 0
    if algorithm.explore is not None:
        strengths = torch.linspace(*algorithm.explore, group)  # as the algorithm draws them: rounding decides which are exactly 1
        guided = guided / images * (algorithm.prompts - unsafe) * group + unsafe * int((strengths != 1).sum())
    trained = algorithm.times * images
    reference = (1 if algorithm.anchor_guidance == 1 else 2) + (algorithm.old != "now")
    return Forwards(images, images * recipe.process.steps + guided * sum(guides), trained, trained * reference)


def _grpo(recipe: Recipe, algorithm: Grpo, unsafe: float, guides: list[bool]) -> Forwards:
    images, window = algorithm.prompts * algorithm.group, algorithm.window
    branches = [2 if on and recipe.process.guidance != 1 else 1 for on in guides]
    shared = window.start if window and algorithm.share_prefix else 0
    painted = sum(branches[:shared]) * algorithm.prompts + sum(branches[shared:]) * images
    # The last step has no noise.
    noisy = range(window.start, window.start + window.length) if window else range(recipe.process.steps - 1 - algorithm.drop_last)
    steps = min(algorithm.train_steps or len(noisy), len(noisy))
    second = sum(branches[step] - 1 for step in noisy) / len(noisy) * steps if algorithm.train_guidance != "off" else 0  # unconditional branches
    trained = steps + (second if algorithm.train_guidance == "both" else 0)
    base = steps + second if algorithm.benign_kl or algorithm.unsafe_kl else 0
    return Forwards(images, painted, images * trained, images * (base + (second if algorithm.train_guidance == "stop" else 0)))


def _guided(recipe: Recipe) -> list[bool]:
    """Whether guidance acts in each step of an even grid, as Stable Diffusion's is."""
    low, high = recipe.process.guidance_range
    steps = recipe.process.steps
    return [low * 1000 <= step * (1000 // steps) + 1 <= high * 1000 for step in reversed(range(steps))]


_COUNTS: dict[type, Callable[[Recipe, Any, float, list[bool]], Forwards]] = {Forward: _forward, Grpo: _grpo}


def _unsafe(recipe: Recipe) -> float:
    """Unsafe prompts of an iteration, on average."""
    if not recipe.data.safe or not recipe.data.unsafe:
        return recipe.algorithm.prompts if recipe.data.unsafe else 0
    return recipe.algorithm.prompts * recipe.data.unsafe_share
