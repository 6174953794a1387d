"""Which prompts a training step sees: a function of (seed, step), so a resumed run sees what it would have seen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated

import torch
from pydantic import Field

from safediffusion.config import settings
from safediffusion.errors import UserError
from safediffusion.seeds import generator
from safediffusion.types import Prompt


@settings
class DataSettings:
    """The prompts to train on: named sets such as pictograms/train-safe, or files (.txt, .jsonl, .csv)."""

    safe: str = "pictograms/train-safe"  # benign prompts: they keep their own target and are held to the base; "" for none
    unsafe: str = "pictograms/train-unsafe"  # prompts whose pictures should become safe; "" for none
    unsafe_share: float = Field(default=0.5, ge=0, le=1)  # of the prompts of an iteration
    repeat: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)  # visits per epoch by task, where not one: more for what the model is weak at


def repeated(prompts: Sequence[Prompt], repeat: Mapping[str, int]) -> tuple[Prompt, ...]:
    """Each prompt as often as `repeat` says of its task, once where it says nothing."""
    return tuple(prompt for prompt in prompts for _ in range(repeat.get(prompt.task, 1)))


@dataclass(frozen=True)
class PromptSampler:
    """Mixes two sets. Each is visited once per epoch in an order of its own; an epoch may end within a step.

    `unsafe_share` of the prompts are unsafe in the long run, and in each step to within one prompt. Where one set is
    empty, every prompt comes from the other.
    """

    safe: tuple[Prompt, ...]
    unsafe: tuple[Prompt, ...]
    unsafe_share: float
    per_step: int
    seed: int

    def __post_init__(self) -> None:
        if not self.safe and not self.unsafe:
            raise UserError("there are no prompts to train on: both the safe and the unsafe set are empty")
        if not 0 <= self.unsafe_share <= 1:
            raise UserError(f"unsafe_share should lie between 0 and 1, but is {self.unsafe_share}")
        if self.per_step < 1:
            raise UserError(f"prompts per step should be at least 1, but is {self.per_step}")

    def at(self, step: int) -> tuple[Prompt, ...]:
        """The `per_step` prompts of a step: the safe ones first."""
        drawn = [self.per_step * i for i in (step, step + 1)]
        unsafe = [self._unsafe_among(count) for count in drawn]
        safe = [count - bad for count, bad in zip(drawn, unsafe, strict=True)]
        return self._visited("safe", self.safe, *safe) + self._visited("unsafe", self.unsafe, *unsafe)

    def texts(self, steps: int) -> tuple[str, ...]:
        """All that the first `steps` steps see, each once."""
        drawn = self.per_step * steps
        bad = self._unsafe_among(drawn)
        # A whole epoch has every prompt, so that no more than the first is walked through, however many the steps.
        seen = self._visited("safe", self.safe, 0, min(drawn - bad, len(self.safe))) + self._visited("unsafe", self.unsafe, 0, min(bad, len(self.unsafe)))
        return tuple(dict.fromkeys(prompt.text for prompt in seen))

    def _unsafe_among(self, count: int) -> int:
        """How many of the first `count` prompts of the run are unsafe."""
        if not self.safe or not self.unsafe:
            return count if self.unsafe else 0
        return math.floor(count * self.unsafe_share + 1e-9)  # so that 0.1 * 30 is 3 whatever the rounding

    def _visited(self, name: str, prompts: tuple[Prompt, ...], start: int, stop: int) -> tuple[Prompt, ...]:
        visits = (divmod(visit, len(prompts)) for visit in range(start, stop))
        return tuple(prompts[_order(self.seed, name, epoch, len(prompts))[place]] for epoch, place in visits)


def sampler_of(data: DataSettings, safe: Sequence[Prompt], unsafe: Sequence[Prompt], per_step: int, seed: int) -> PromptSampler:
    """Of these prompts, as the recipe's table says. UserError for visits of a task that none of them has."""
    tasks = {prompt.task for prompt in (*safe, *unsafe)} - {""}
    if strange := sorted(set(data.repeat) - tasks):
        raise UserError(f"data.repeat: no training prompt has the task {strange[0]!r}; their tasks are {', '.join(sorted(tasks)) or 'not given'}")
    return PromptSampler(repeated(safe, data.repeat), repeated(unsafe, data.repeat), data.unsafe_share, per_step, seed)


@lru_cache(maxsize=8)
def _order(seed: int, name: str, epoch: int, count: int) -> list[int]:
    return torch.randperm(count, generator=generator("prompt order", seed, name, epoch)).tolist()
