"""A policy that is steered while it paints, its weights as they are: anything that paints takes it for a policy."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from safediffusion.types import Policy


@dataclass(frozen=True)
class Addressed:
    """The condition `(B, L, D)` of a policy, and the prompts that it was made of: a reward must be told what was asked for."""

    tensor: Tensor
    prompts: tuple[str, ...]

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    def __getitem__(self, part: slice) -> Addressed:
        return Addressed(self.tensor[part], self.prompts[part])


class Guide(Protocol):
    """How the network's output `(B, C, h, w)` is changed: called in place of `policy.predict`, once for each step of a walk."""

    def __call__(self, policy: Policy, x: Tensor, time: Tensor, condition: Addressed, guidance: float | Tensor) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class GuidedPolicy:
    """`policy` with `guide` between it and its sampler. It paints and is not trained."""

    policy: Policy
    guide: Guide

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        return self.policy.sample_shape

    @property
    def network(self) -> torch.nn.Module:
        return self.policy.network

    @property
    def scheduler_config(self) -> dict[str, Any]:
        return self.policy.scheduler_config

    @property
    def sharded(self) -> bool:
        return self.policy.sharded

    def encode(self, prompts: Sequence[str]) -> Addressed:
        return Addressed(self.policy.encode(prompts), tuple(prompts))

    def predict(self, x: Tensor, time: Tensor, condition: Addressed, guidance: float | Tensor = 1.0, stop: bool = False) -> Tensor:
        """As the policy's own; `stop` has no meaning here, as no gradient reaches the weights."""
        return self.guide(self.policy, x, time.to(x.device).expand(len(x)), condition, guidance)

    def decode(self, x: Tensor) -> Tensor:
        return self.policy.decode(x)

    def sketch(self, x: Tensor) -> Tensor:
        return self.policy.sketch(x)

    def reference(self) -> AbstractContextManager[None]:
        return self.policy.reference()

    def state(self) -> dict[str, Tensor]:
        return self.policy.state()

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.policy.load_state(tensors)
