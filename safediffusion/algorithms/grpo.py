"""GRPO on the denoising MDP: the paper's algorithm (SafeDiffusion-R1, arXiv 2605.18719; Flow-GRPO, arXiv 2505.05470), repaired.

docs/method.md section 4. The defaults are ours; `recipes/paper-sd15.toml` sets the paper's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from safediffusion.algorithms.card import Card, require_noise
from safediffusion.algorithms.trajectory import (
    RATIO_METRICS,
    TrainGuidance,
    check_denoising,
    check_ratio,
    check_updates,
    policy_gradient,
    shuffled,
    trained_steps,
    update_by_groups,
)
from safediffusion.algorithms.update import Learner
from safediffusion.config import settings
from safediffusion.errors import UserError
from safediffusion.types import Process, Prompt


@settings
class Window:
    """The only steps that add noise and are trained, the others being walked by `process.solver` (MixGRPO, arXiv 2507.21802).

    Early steps decide the layout, where rewards differ; a short window there trains for a fraction of the forwards.
    """

    start: int = Field(default=0, ge=0)  # its first step
    length: int = Field(default=2, ge=1)
    schedule: Literal["fixed", "sliding", "random"] = "fixed"  # "sliding" goes on by a step every `hold` iterations, "random" draws its start anew
    hold: int = Field(default=10, ge=1)

    def at(self, iteration: int, steps: int, generator: torch.Generator) -> tuple[int, ...]:
        """The steps of this iteration, out of the `steps` that may add noise; past the end a sliding window starts over."""
        starts = steps - self.length + 1
        if self.schedule == "fixed":
            first = self.start
        elif self.schedule == "sliding":
            first = self.start + iteration // self.hold % (starts - self.start)
        else:
            first = int(torch.randint(self.start, starts, (), generator=generator))
        return tuple(range(first, first + self.length))


@settings
class Grpo:
    """Each denoising step is an action with a Gaussian log-probability; pictures of one prompt compete with each other."""

    kind: Literal["grpo"] = "grpo"
    prompts: int = Field(default=16, ge=1)  # per iteration
    group: int = 8  # pictures per prompt
    updates: int = Field(default=1, ge=1)  # optimizer steps per rollout, each on whole groups
    # The trained forward: "off" is the conditional branch alone, "both" guidance through both branches (paper), "stop" guidance
    # without gradient through the unconditional one.
    train_guidance: TrainGuidance = "off"
    window: Window | None = None  # left out, every step but the last adds noise and is trained
    share_prefix: bool = False  # pictures of a prompt share the initial noise and the steps before the window
    train_steps: int = Field(default=0, ge=0)  # of the noisy steps trained in each iteration, drawn anew; 0 is all
    # Stochastic steps left out at the end, where log-probability is most sensitive (docs/method.md section 3); a window leaves out none.
    drop_last: int = Field(default=1, ge=0)
    normalise_ratio: bool = True  # divide the log-ratio by the sensitivity of its step, so that all steps weigh alike
    clip_range: float = Field(default=1e-4, gt=0)  # of the ratio; per latent dimension, so that it does not depend on the picture's size
    floor: float = Field(default=0.02, ge=0)  # added to the group's std: keeps small differences small
    clip: float = Field(default=2.5, gt=0)  # of the advantage
    slack: float = Field(
        default=0.0, ge=0
    )  # benign prompts' scores so near the best of their group count as equal: what is right need not be prettier, and stays diverse
    least_spread: float = Field(default=1e-4, ge=0)  # groups below it are dead: nothing is trained on them, not even the pull to the base; 0 keeps all
    benign_kl: float = Field(default=1.0, ge=0)  # weight of KL(policy || base) per dimension on benign prompts
    unsafe_kl: float = Field(default=0.01, ge=0)  # the same on unsafe prompts; large values keep the danger

    card: ClassVar[Card] = Card(
        technique="policy gradient",
        signal="score",
        paper="GRPO on diffusion, arXiv 2505.05470",
        file="algorithms/grpo.py",
        restraint=("KL to the base", "clipped ratio"),
        log_probs=True,
    )

    def check(self, recipe: Any) -> None:
        """Raises UserError for settings of a recipe that cannot work together."""
        require_noise(recipe.process, self.kind)
        steps, window = recipe.process.steps, self.window
        if window is not None and window.start + window.length > steps - 1:
            raise UserError(f"algorithm.window ends at step {window.start + window.length}, and only the first {steps - 1} of {steps} steps can add noise; shorten it")
        if self.share_prefix and window is None:
            raise UserError("algorithm.share_prefix shares the steps before a window; give algorithm.window.start and length")
        check_updates(self)
        check_ratio(self, recipe)
        if window is None:
            check_denoising(self, recipe)

    def step(self, learner: Learner, prompts: Sequence[Prompt], generator: torch.Generator) -> dict[str, float]:
        process = self.windowed(learner, generator)
        rolled = learner.paint(prompts, self.group, generator, remember=True, process=process, share_prefix=self.share_prefix)
        gain, metrics = learner.worth(rolled, self.floor, self.clip, self.least_spread, self.slack)
        groups = shuffled(gain, self.group, generator)
        losses = policy_gradient(self, learner, process, self.trained_steps(process, generator), self.clip_range)
        return metrics | update_by_groups(self, learner, rolled, gain.value, groups, losses, RATIO_METRICS)

    def windowed(self, learner: Learner, generator: torch.Generator) -> Process:
        """The process of this iteration: noise in the window alone."""
        process = learner.process
        return process if self.window is None else replace(process, window=self.window.at(learner.iteration, len(process.times) - 1, generator))

    def trained_steps(self, process: Process, generator: torch.Generator) -> tuple[int, ...]:
        return trained_steps(self, process, self.drop_last if self.window is None else 0, generator)
