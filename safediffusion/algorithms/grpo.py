"""GRPO on the denoising MDP: the paper's algorithm (SafeDiffusion-R1, arXiv 2605.18719; Flow-GRPO, arXiv 2505.05470), repaired.

docs/method.md section 4. The defaults are ours; `recipes/paper-sd15.toml` sets the paper's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from safediffusion import ranks
from safediffusion.algorithms.update import Learner, advantages, class_weights, reward_metrics
from safediffusion.config import settings
from safediffusion.rollout import Rollout, chunks, roll_out
from safediffusion.types import Prompt


@settings
class Grpo:
    """Each denoising step is an action with a Gaussian log-probability; pictures of one prompt compete with each other."""

    kind: Literal["grpo"] = "grpo"
    prompts: int = Field(default=16, ge=1)  # per iteration
    group: int = 8  # pictures per prompt
    updates: int = Field(default=1, ge=1)  # optimizer steps per rollout, each on whole groups
    train_guidance: bool = False  # guidance in the trained forward too (paper) or the conditional branch alone
    drop_last: int = Field(default=1, ge=0)  # stochastic steps left out at the end, where log-probability is most sensitive (docs/method.md section 3)
    normalise_ratio: bool = True  # divide the log-ratio by the sensitivity of its step, so that all steps weigh alike
    clip_range: float = Field(default=1e-4, gt=0)  # of the ratio; per latent dimension, so that it does not depend on the picture's size
    floor: float = Field(default=0.02, ge=0)  # added to the group's std: keeps small differences small
    clip: float = Field(default=2.5, gt=0)  # of the advantage
    slack: float = Field(default=0.0, ge=0)  # scores so near the best of their group count as equal: what is right need not be prettier, and stays diverse
    least_spread: float = Field(default=1e-4, ge=0)  # groups below it are dead: nothing is trained on them, not even the pull to the base; 0 keeps all
    benign_kl: float = Field(default=0.5, ge=0)  # weight of KL(policy || base) per dimension on benign prompts
    unsafe_kl: float = Field(default=0.1, ge=0)  # the same on unsafe prompts; large values keep the danger

    def step(self, learner: Learner, prompts: Sequence[Prompt], generator: torch.Generator) -> dict[str, float]:
        rolled = roll_out(learner.policy, learner.process, learner.reward, prompts, self.group, learner.guidance, generator, True, learner.batch)
        learner.forwards += len(rolled) * len(learner.process.times) * (1 if learner.guidance == 1 else 2)
        gain = advantages(rolled.scores.total, self.group, self.floor, self.clip, self.least_spread, self.slack)
        metrics = reward_metrics(rolled.prompts, rolled.scores, gain)
        alive = gain.members(self.group).view(-1, self.group)
        alive = alive[torch.randperm(len(alive), generator=generator)]
        totals = torch.zeros(5, dtype=torch.float64)
        norms = []
        for groups in alive.chunk(self.updates) if len(alive) else ():
            index = groups.flatten()
            norms.append(learner.descend(self._losses(learner, rolled[index], gain.value[index.to(gain.value.device)], totals)))
        totals = ranks.summed(totals)
        count = max(float(totals[4]), 1.0)
        names = ("loss", "kl", "ratio/distance", "ratio/clipped")
        metrics |= {name: float(value) / count for name, value in zip(names, totals[:4], strict=True)}
        return metrics | {"grad_norm": sum(norms) / len(norms) if norms else 0.0}

    def trained_steps(self, learner: Learner) -> tuple[int, ...]:
        noisy = learner.process.stochastic_steps
        return noisy[: len(noisy) - self.drop_last]

    def _losses(self, learner: Learner, rolled: Rollout, gain: Tensor, totals: Tensor) -> Iterator[Tensor]:
        policy, process, steps = learner.policy, learner.process, self.trained_steps(learner)
        device, guidance = gain.device, learner.guidance if self.train_guidance else 1.0
        pull = class_weights(torch.tensor([p.unsafe for p in rolled.prompts], device=device), self.benign_kl, self.unsafe_kl)
        gain, pull = gain[rolled.mine], pull[rolled.mine]
        share = 1 / (len(rolled) * len(steps))
        for step in steps:
            x, x_next, old = rolled.walk.states[step], rolled.walk.states[step + 1], rolled.walk.log_probs[step]
            dimensions = x.shape[1:].numel()
            scale = 1 / process.sensitivity(step) if self.normalise_ratio else 1.0
            for part in chunks(len(rolled.mine), learner.batch):
                time = torch.full((len(x[part]),), int(process.times[step]), device=device)
                kernel = process.kernel(policy.predict(x[part], time, rolled.condition[part], guidance), x[part], step)
                log_prob = kernel.log_prob(x_next[part])
                # Without guidance in training the sampler is another policy; its ratio starts at 1 by definition.
                before = old[part] if guidance == learner.guidance else log_prob.detach()
                ratio = ((log_prob - before) / dimensions * scale).exp()
                loss = torch.maximum(-gain[part] * ratio, -gain[part] * ratio.clamp(1 - self.clip_range, 1 + self.clip_range))
                kl = torch.zeros_like(loss)
                if self.benign_kl or self.unsafe_kl:
                    with torch.no_grad(), policy.reference():
                        base = process.kernel(policy.predict(x[part], time, rolled.condition[part], guidance), x[part], step)
                    kl = kernel.kl(base) / dimensions * scale**2
                learner.forwards += len(loss) * (3 + (1 if self.benign_kl or self.unsafe_kl else 0)) * (1 if guidance == 1 else 2)
                distance = (ratio.detach() - 1).abs()
                measured = torch.stack([loss.detach().sum(), kl.detach().sum(), distance.sum(), (distance > self.clip_range).float().sum()])
                totals += torch.cat([measured, torch.tensor([len(loss)], device=device)]).double().cpu()
                yield (loss + pull[part] * kl).sum() * share
