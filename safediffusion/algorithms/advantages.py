"""What the pictures of a rollout are worth beside each other: centred advantages, and what is measured of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safediffusion.errors import UserError
from safediffusion.rollout import DRIFT
from safediffusion.types import Prompt, Scores

# What the scores `(P, K)` of a rollout, known by their name, are compared with: their mean and spread, `(P, 1)` each.
Baseline = Callable[[str, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Advantages:
    """`value` (B,) with groups of `group`; `alive` (P,) marks groups with enough spread to carry a signal."""

    value: Tensor
    alive: Tensor

    @property
    def dead_share(self) -> float:
        return 1 - float(self.alive.float().mean())

    def members(self, group: int) -> Tensor:
        """Indices (long, CPU) of the pictures of living groups."""
        return torch.arange(len(self.value))[self.alive.cpu().repeat_interleave(group)]


def own_group(name: str, grouped: Tensor) -> tuple[Tensor, Tensor]:
    """The baseline of GRPO: the other pictures of the same prompt."""
    mean = grouped.mean(1, keepdim=True)
    return mean, (grouped - mean).square().mean(1, keepdim=True).sqrt()


def advantages(
    total: Tensor, group: int, floor: float, clip: float, least_spread: float, slack: float | Tensor = 0.0, baseline: Baseline = own_group, name: str = "total"
) -> Advantages:
    """Scores `(r - mean) / (std + floor)` by the mean and std of a baseline, clipped to +-`clip` (docs/method.md section 4).

    Scores within `slack` of the best of their group count as equal; a tensor `(P,)` gives every group its own. A group whose scores then lie nearer than
    `least_spread` to the mean, as a root mean square, is dead: its advantages are zero and it should not be trained on.
    """
    grouped = total.float().view(-1, group)
    slack = torch.as_tensor(slack, dtype=grouped.dtype, device=grouped.device).reshape(-1, 1)
    grouped = torch.minimum(grouped, grouped.amax(1, keepdim=True) - slack)
    mean, spread = baseline(name, grouped)
    centred = grouped - mean
    alive = centred.square().mean(1).sqrt() >= least_spread
    value = (centred / (spread + floor)).clamp(-clip, clip) * alive[:, None]
    return Advantages(value.flatten(), alive)


def unlikeness(scores: Scores, group: int, slack: float) -> Tensor:
    """How much more unlike the other good pictures of its group each good picture is than they are, `(B,)`: 0 for the rest.

    Good are those within `slack` of the best score of their group; the measure is the mean cosine distance of the reward's
    embeddings, less its mean. Not standardised: as an advantage it is then the gradient of the mean distance, so that prompts that
    leave much open count for more than those that leave nothing. Raises UserError for a reward that gives no embeddings.
    """
    if scores.embedding is None:
        raise UserError("algorithm.diversity needs the embeddings of a reward's encoder, and this reward gives none (Scores.embedding); set it to 0")
    seen, total = scores.embedding.float().view(-1, group, scores.embedding.shape[1]), scores.total.float().view(-1, group)
    good = total >= total.amax(1, keepdim=True) - slack
    count = good.sum(1, keepdim=True)
    others = good[:, None, :] & ~torch.eye(group, dtype=torch.bool, device=good.device)
    distance = ((1 - seen @ seen.mT) * others).sum(2) / (count - 1).clamp(min=1)
    return ((distance - (distance * good).sum(1, keepdim=True) / count) * good).flatten()


def reward_metrics(prompts: Sequence[Prompt], scores: Scores, gain: Advantages) -> dict[str, float]:
    """Mean scores of a rollout: the total, its parts, and the total of each prompt class that occurs. The drift is none of the reward's."""
    unsafe = torch.tensor([prompt.unsafe for prompt in prompts], device=scores.total.device)
    measured = {**scores.parts, "total": scores.total, "total/benign": scores.total[~unsafe], "total/unsafe": scores.total[unsafe]}
    return {f"reward/{name}": float(value.mean()) for name, value in measured.items() if len(value) and name != DRIFT} | {"dead_groups": gain.dead_share}


def class_weights(unsafe: Tensor, benign_weight: float, unsafe_weight: float) -> Tensor:
    """A weight per picture by the class of its prompt, `(B,)`."""
    return torch.where(unsafe, unsafe_weight, benign_weight)
