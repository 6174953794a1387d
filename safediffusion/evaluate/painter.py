"""Who paints the pictures of an evaluation: a model, and the guide that steers it meanwhile."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from safediffusion.policies.latent import LatentPolicy
from safediffusion.policies.settings import EXACT, Held
from safediffusion.policies.variant import Variant
from safediffusion.types import Policy


@dataclass(frozen=True)
class Painter:
    """A model; under a guide, `guide` has all of its settings as JSON, and `guided` puts it onto the loaded policy.

    It is handed in because a guide may follow a reward, and an evaluation knows none.
    """

    variant: Variant
    guide: Mapping[str, Any] = field(default_factory=dict)
    guided: Callable[[LatentPolicy], Policy] | None = None
    held: Held = EXACT

    @property
    def description(self) -> dict[str, Any]:
        """All that decides its pictures besides prompt, seed and sampler; without a guide, held exactly, the model's own."""
        steered: dict[str, Any] = {"guide": dict(self.guide)} if self.guide else {}
        return self.variant.description | steered | self.held.facts

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.description, sort_keys=True).encode()).hexdigest()

    def load(self, device: torch.device, texts: Sequence[str]) -> LatentPolicy:
        """The model to paint `texts` with, its guide not yet on it."""
        return self.variant.load(device, self.held.settings(), [*texts, self.guide.get("concept", "")])
