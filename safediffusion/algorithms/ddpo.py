"""DDPO: policy gradients on the denoising MDP against a running baseline of each prompt (arXiv 2305.13301).

Its importance-sampled form is what GRPO clips as well; the two differ in what a score is compared with: here also with
what the prompt has earned in earlier rollouts. Log-ratios are per latent dimension, as in the published code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from safediffusion.algorithms.advantages import Baseline
from safediffusion.algorithms.card import Card
from safediffusion.algorithms.trajectory import RATIO_METRICS, TrainGuidance, check_denoising, check_ratio, policy_gradient, shuffled, trained_steps, update_by_groups
from safediffusion.algorithms.update import Learner
from safediffusion.config import settings
from safediffusion.errors import UserError
from safediffusion.types import Prompt


@settings
class Ddpo:
    """Scores are compared with the last ones of the same prompt, this rollout's among them."""

    kind: Literal["ddpo"] = "ddpo"
    # "importance" clips the ratio to the policy that painted, so that a rollout lasts for several updates (DDPO-IS); "score" is the plain
    # score function, which holds for one (DDPO-SF).
    estimator: Literal["importance", "score"] = "importance"
    prompts: int = Field(default=16, ge=1)  # per iteration
    group: int = 8  # pictures per prompt
    updates: int = Field(default=1, ge=1)  # optimizer steps per rollout, each on whole groups
    remember: int = Field(default=16, ge=2)  # scores of each prompt; more is steadier, and older
    min_count: int = Field(default=8, ge=2)  # with fewer scores of a prompt, those of the whole rollout are the baseline; up to `group` its own always are
    train_guidance: TrainGuidance = "off"  # as in grpo
    train_steps: int = Field(default=0, ge=0)  # of the noisy steps trained in each iteration, drawn anew; 0 is all
    drop_last: int = Field(default=1, ge=0)  # stochastic steps left out at the end, where log-probability is most sensitive (docs/method.md section 3)
    normalise_ratio: bool = True  # divide the log-ratio by the sensitivity of its step, so that all steps weigh alike
    # Of the ratio, per latent dimension, by "importance". Its spread falls with the root of the dimensions: 1e-4 is the paper's for 16,384; on the 256 of the
    # embedded model more than one update wants 1e-3.
    clip_range: float = Field(default=1e-4, gt=0)
    floor: float = Field(default=0.02, ge=0)  # added to the std: keeps small differences small
    clip: float = Field(default=5.0, gt=0)  # of the advantage
    slack: float = Field(default=0.0, ge=0)  # benign prompts' scores so near the best of their group count as equal
    least_spread: float = Field(default=1e-4, ge=0)  # groups that lie nearer to their baseline are dead: nothing is trained on them; 0 keeps all
    benign_kl: float = Field(default=1.0, ge=0)  # weight of KL(policy || base) per dimension on benign prompts; the paper has none
    unsafe_kl: float = Field(default=0.01, ge=0)  # the same on unsafe prompts; large values keep the danger

    card: ClassVar[Card] = Card(
        technique="policy gradient",
        signal="score",
        paper="DDPO, arXiv 2305.13301",
        file="algorithms/ddpo.py",
        restraint=("KL to the base", "clipped ratio"),
        log_probs=True,
    )

    def check(self, recipe: Any) -> None:
        """Raises UserError for settings of a recipe that cannot work together."""
        check_denoising(self, recipe)
        check_ratio(self, recipe)
        if self.estimator == "score" and self.updates > 1:
            raise UserError(f'algorithm.estimator = "score" holds for the policy that painted, not after {self.updates - 1} updates; set algorithm.updates = 1')
        if recipe.constraints and recipe.lagrangian.normalise == "together":
            raise UserError(
                'lagrangian.normalise = "together" takes weight * cost off the scores, and the running baseline of algorithm.kind = "ddpo" '
                'has those of earlier weights; set normalise = "apart", or take "grpo", which compares pictures of one rollout'
            )
        if self.min_count > self.remember:
            raise UserError(f"algorithm.min_count = {self.min_count} is never reached by the {self.remember} scores that are kept; raise algorithm.remember")

    def step(self, learner: Learner, prompts: Sequence[Prompt], generator: torch.Generator) -> dict[str, float]:
        rolled = learner.paint(prompts, self.group, generator, remember=True)
        baseline = running(learner.memory, prompts, self.remember, self.min_count)
        gain, metrics = learner.worth(rolled, self.floor, self.clip, self.least_spread, self.slack, baseline)
        groups = shuffled(gain, self.group, generator)
        steps = trained_steps(self, learner.process, self.drop_last, generator)
        losses = policy_gradient(self, learner, learner.process, steps, self.clip_range if self.estimator == "importance" else None)
        return metrics | update_by_groups(self, learner, rolled, gain.value, groups, losses, RATIO_METRICS)


def running(memory: dict[str, Tensor], prompts: Sequence[Prompt], remember: int, min_count: int) -> Baseline:
    """Mean and std of the last `remember` scores of each of the P prompts; the rollout's own where a prompt has fewer than `min_count`.

    Per-prompt stat tracking (appendix of the paper; `PerPromptStatTracker` of its code). In `memory` are, for the total and for each part that is
    normalised by itself, a key of each prompt ever seen (N,) int64 and its scores (N, remember), oldest first and then NaN.
    """
    keys = [int.from_bytes(hashlib.blake2b(prompt.text.encode(), digest_size=8).digest(), "big", signed=True) for prompt in prompts]

    def baseline(name: str, grouped: Tensor) -> tuple[Tensor, Tensor]:
        at = f"baseline.{name}."
        table = {}
        if at + "prompts" in memory:
            table = {key: row[~row.isnan()] for key, row in zip(memory[at + "prompts"].tolist(), memory[at + "scores"], strict=True)}
        whole = grouped.cpu()
        for key, row in zip(keys, whole, strict=True):
            table[key] = torch.cat([table.get(key, row[:0]), row])[-remember:]
        padded = [torch.nn.functional.pad(row, (0, remember - len(row)), value=torch.nan) for row in table.values()]
        memory.update({at + "prompts": torch.tensor(list(table)), at + "scores": torch.stack(padded)})
        compared = [(table[key] if len(table[key]) >= min_count else whole.flatten()).double() for key in keys]
        mean, std = (torch.tensor([[float(value)] for value in each]).to(grouped) for each in zip(*((c.mean(), c.std(correction=0)) for c in compared), strict=True))
        return mean, std

    return baseline
