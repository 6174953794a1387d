"""How many denoiser forwards an iteration of a recipe takes: the predicted growth of `Learner.forwards`, to the last one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from safediffusion.algorithms.forward import Forward
from safediffusion.algorithms.grpo import Grpo
from safediffusion.recipe import Recipe


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


def forwards(recipe: Recipe, unsafe: int | None = None) -> Forwards | None:
    """Those of one iteration of `recipe`, in which `unsafe` prompts are unsafe; None for an algorithm that has no count here.

    Dead groups are painted and not trained on, which nobody knows beforehand: with them it is an upper bound.
    """
    count = _COUNTS.get(type(recipe.algorithm))
    return count(recipe, recipe.algorithm, _unsafe(recipe) if unsafe is None else unsafe) if count else None


def _forward(recipe: Recipe, algorithm: Forward, unsafe: float) -> Forwards:
    images, group = algorithm.prompts * algorithm.group, algorithm.group
    guided: float = images if recipe.process.guidance != 1 else 0
    if algorithm.explore is not None:
        strengths = torch.linspace(*algorithm.explore, group)  # as the algorithm draws them: rounding decides which are exactly 1
        guided = guided / images * (algorithm.prompts - unsafe) * group + unsafe * int((strengths != 1).sum())
    trained = algorithm.times * images
    return Forwards(images, (images + guided) * recipe.process.steps, trained, trained * (1 if algorithm.anchor_guidance == 1 else 2))


def _grpo(recipe: Recipe, algorithm: Grpo, unsafe: float) -> Forwards:
    images, guidance = algorithm.prompts * algorithm.group, recipe.process.guidance
    steps = recipe.process.steps - 1 - algorithm.drop_last  # the last step has no noise
    trained = images * steps * (2 if algorithm.train_guidance and guidance != 1 else 1)
    reference = trained if algorithm.benign_kl or algorithm.unsafe_kl else 0
    return Forwards(images, images * recipe.process.steps * (1 if guidance == 1 else 2), trained, reference)


_COUNTS: dict[type, Callable[[Recipe, Any, float], Forwards]] = {Forward: _forward, Grpo: _grpo}


def _unsafe(recipe: Recipe) -> float:
    """Unsafe prompts of an iteration, on average."""
    if not recipe.data.safe or not recipe.data.unsafe:
        return recipe.algorithm.prompts if recipe.data.unsafe else 0
    return recipe.algorithm.prompts * recipe.data.unsafe_share
