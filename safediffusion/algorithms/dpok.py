"""DPOK: a KL-regularised policy gradient on the denoising MDP (arXiv 2305.16381, algorithm 1).

As in the paper the reward keeps its unit: the weight of the reward against the KL to the pretrained model, taken at every denoising step, is
what is chosen. Different from it: the baseline is the mean of the prompt's other pictures, where the paper learns a value network of
prompt and latent; the KL may weigh otherwise on benign and unsafe prompts; and log-ratios are per latent dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from safediffusion.algorithms.card import Card, require_units
from safediffusion.algorithms.trajectory import RATIO_METRICS, TrainGuidance, check_denoising, check_ratio, policy_gradient, shuffled, trained_steps, update_by_groups
from safediffusion.algorithms.update import Learner
from safediffusion.config import settings
from safediffusion.types import Prompt


@settings
class Dpok:
    """An advantage is the reward less the mean of its prompt, not standardised: prompts of much spread count for more."""

    kind: Literal["dpok"] = "dpok"
    prompts: int = Field(default=16, ge=1)  # per iteration
    group: int = 8  # pictures per prompt
    updates: int = Field(default=1, ge=1)  # optimizer steps per rollout, each on whole groups
    reward_weight: float = Field(default=10.0, gt=0)  # of the reward against the KL: its advantages should come to about 1
    train_guidance: TrainGuidance = "off"  # as in grpo
    train_steps: int = Field(default=0, ge=0)  # of the noisy steps trained in each iteration, drawn anew; 0 is all
    drop_last: int = Field(default=1, ge=0)  # stochastic steps left out at the end, where log-probability is most sensitive (docs/method.md section 3)
    normalise_ratio: bool = True  # divide the log-ratio by the sensitivity of its step, so that all steps weigh alike
    # Of the ratio, per latent dimension. Its spread falls with the root of the dimensions: 1e-4 is the paper's for 16,384; on the 256 of the
    # embedded model more than one update wants 1e-3.
    clip_range: float = Field(default=1e-4, gt=0)
    clip: float = Field(default=5.0, gt=0)  # of the advantage; the paper has none
    slack: float = Field(default=0.0, ge=0)  # benign prompts' scores so near the best of their group count as equal
    least_spread: float = Field(default=1e-4, ge=0)  # groups below it are dead: nothing is trained on them, not even the pull to the base; 0 keeps all
    benign_kl: float = Field(default=1.0, ge=0)  # weight of KL(policy || base) per dimension on benign prompts
    unsafe_kl: float = Field(default=0.01, ge=0)  # the same on unsafe prompts; large values keep the danger

    card: ClassVar[Card] = Card(
        technique="policy gradient",
        signal="score",
        paper="DPOK, arXiv 2305.16381",
        file="algorithms/dpok.py",
        restraint=("KL to the base", "clipped ratio"),
        log_probs=True,
    )

    def check(self, recipe: Any) -> None:
        """Raises UserError for settings of a recipe that cannot work together."""
        check_denoising(self, recipe)
        check_ratio(self, recipe)
        require_units(recipe.reward, "algorithm.kind = 'dpok' weighs the reward in its own unit against the KL")

    def step(self, learner: Learner, prompts: Sequence[Prompt], generator: torch.Generator) -> dict[str, float]:
        rolled = learner.paint(prompts, self.group, generator, remember=True)
        gain, metrics = learner.worth(rolled, 0.0, self.clip, self.least_spread, self.slack, self._baseline)
        groups = shuffled(gain, self.group, generator)
        steps = trained_steps(self, learner.process, self.drop_last, generator)
        losses = policy_gradient(self, learner, learner.process, steps, self.clip_range)
        return metrics | update_by_groups(self, learner, rolled, gain.value, groups, losses, RATIO_METRICS)

    def _baseline(self, name: str, grouped: Tensor) -> tuple[Tensor, Tensor]:
        mean = grouped.mean(1, keepdim=True)
        return mean, torch.full_like(mean, 1 / self.reward_weight)
