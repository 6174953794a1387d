"""Several rewards at once, by name: summed, or for the objective to normalise apart, each for the prompts that it is meant for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from safediffusion.config import settings
from safediffusion.errors import UserError
from safediffusion.rewards.callable import CallableSettings
from safediffusion.rewards.detection import DetectionSettings
from safediffusion.rewards.jpeg import JpegSettings
from safediffusion.rewards.preference import PreferenceSettings
from safediffusion.rewards.scores import Measures
from safediffusion.rewards.similarity import SimilaritySettings
from safediffusion.rewards.steering import SteeringSettings
from safediffusion.types import Class, Prompt, Reward, Scores, mask

Single = SteeringSettings | SimilaritySettings | DetectionSettings | PreferenceSettings | JpegSettings | CallableSettings


@settings
class Part:
    """A `[[reward.parts]]` table."""

    name: str = Field(pattern="^[a-z][a-z0-9_]*$")  # metrics, constraints and reports call it by this
    weight: float = 1.0  # of its total; 0 measures it alone, for a constraint or to look at
    prompts: Class = "all"  # the class of prompts for which it counts
    reward: Annotated[Single, Field(discriminator="kind")]


@settings
class CombinedSettings:
    """A `[reward]` table of kind "combined"."""

    kind: Literal["combined"] = "combined"
    parts: tuple[Part, ...] = Field(min_length=1)
    # "sum" adds the weighted totals, so that their units decide; "each" standardises every part in its group first and adds the weighted
    # advantages, so that a part with large numbers does not drown the others; "gdpo" standardises that sum over the batch as well, so that
    # advantages are no larger for many parts than for one (GDPO, arXiv 2601.05242).
    normalise: Literal["sum", "each", "gdpo"] = "sum"

    @property
    def measures(self) -> Measures | None:
        """The totals of the parts by name, and their own parts as `name.part`; None where a user's function is among them."""
        found: Measures = {}
        for part in self.parts:
            if part.reward.measures is None:
                return None
            found |= {part.name: part.reward.differentiable} | {f"{part.name}.{name}": flows for name, flows in part.reward.measures.items()}
        return found

    @property
    def differentiable(self) -> bool:
        return all(part.reward.differentiable for part in self.parts if part.weight)

    def check(self) -> None:
        """Raises UserError for parts that cannot be told apart, or of which none counts."""
        names = [part.name for part in self.parts]
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"reward.parts: two parts are called {twice[0]!r}; give each its own name")
        if not any(part.weight for part in self.parts):
            raise UserError("reward.parts: every weight is 0, so there is nothing to learn; give one part a weight")


def parts_of(options: Single | CombinedSettings) -> tuple[Part, ...]:
    """The parts of a reward; a single one is the only part of itself."""
    return options.parts if isinstance(options, CombinedSettings) else (Part(name="reward", reward=options),)


@dataclass(frozen=True, eq=False)
class Member:
    """One reward among several, and for which prompts it counts how much."""

    name: str
    reward: Reward
    weight: float = 1.0
    prompts: Class = "all"


@dataclass(frozen=True, eq=False)
class CombinedReward:
    """r = sum of weight * r_i over the members that the prompt's class is meant for.

    Parts "NAME", the member's total, and "NAME.PART", of every prompt whichever class it counts for. The embedding is that of the first
    member that has one.
    """

    members: tuple[Member, ...]

    @property
    def differentiable(self) -> bool:
        return all(member.reward.differentiable for member in self.members if member.weight)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        total, parts, embedding = torch.zeros(len(images), device=images.device), {}, None
        for member in self.members:
            scores = member.reward(images, prompts)
            parts |= {member.name: scores.total} | {f"{member.name}.{name}": value for name, value in scores.parts.items()}
            if member.weight:
                total = total + member.weight * mask(prompts, member.prompts, images.device) * scores.total
            embedding = scores.embedding if embedding is None else embedding
        return Scores(total, parts, embedding)
