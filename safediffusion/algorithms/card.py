"""What an algorithm says of itself: a row of `safediffusion methods`, in the terms of the survey arXiv 2505.17352."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from safediffusion.errors import UserError

Technique = Literal["policy gradient", "reward-weighted likelihood", "direct back-propagation", "preference optimisation", "binary utility", "forward process"]
# Whose word it is, "human" or "automated"; and where a score is not taken as such, what is left of it.
Feedback = Literal["human", "automated", "binary", "ranked"]
Restraint = Literal["KL to the base", "loss against the base", "clipped ratio", "pull to the policy that painted"]
Safety = Literal["constraint", "preference"]


@dataclass(frozen=True)
class Card:
    """One method. Its cost in denoiser forwards is counted by the cost room, from a recipe."""

    technique: Technique
    signal: str  # what it learns from: a score, its gradient, pairs, a label
    paper: str  # name and arXiv number
    file: str  # module of this package
    feedback: tuple[Feedback, ...] = ("automated",)
    restraint: tuple[Restraint, ...] = ("KL to the base",)  # its own, against over-optimisation of the reward; probes and early stop are the loop's
    log_probs: bool = False  # needs process.eta > 0
    reward_gradient: bool = False  # needs a differentiable reward
    pairs: bool = False
    on_policy: bool = True  # False: can learn from pictures that an older policy, or nobody, painted
    safety: tuple[Safety, ...] = ("constraint",)  # "preference" where it can only be part of what is preferred
    enters: str = "advantage"  # where the objective, and with it a constraint: advantage, label, pair, weight of a picture, loss


def require_units(reward: Any, why: str) -> None:
    """Raises UserError where the parts of a reward are normalised apart and a method, as `why` says, needs a total in its own unit."""
    normalise = getattr(reward, "normalise", "sum")
    if normalise != "sum":
        raise UserError(f'reward.normalise = "{normalise}" normalises the advantages of each part, and {why}; set "sum" and weigh the parts')


def require_noise(process: Any, kind: str) -> None:
    """Raises UserError where a method needs log-probabilities and the process settings leave none."""
    if process.eta == 0:
        raise UserError(f"algorithm.kind = '{kind}' needs log-probabilities, and process.eta = 0 has none; set process.eta = 1, or use algorithm.kind = 'forward'")
