"""Who paints the pictures of an evaluation: a model, and the guide that steers it meanwhile."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from safediffusion.policies.latent import LatentPolicy
from safediffusion.policies.settings import Precision
from safediffusion.policies.variant import AS_IT_IS, Variant
from safediffusion.types import Policy


@dataclass(frozen=True)
class Painter:
    """A model; under a guide, `guide` has all of its settings as JSON, and `guided` puts it onto the loaded policy.

    It is handed in because a guide may follow a reward, and an evaluation knows none.
    """

    variant: Variant
    guide: Mapping[str, Any] = field(default_factory=dict)
    guided: Callable[[LatentPolicy], Policy] | None = None
    dtype: Precision = "float32"  # arithmetic of the denoiser

    @property
    def description(self) -> dict[str, Any]:
        """All that decides its pictures besides prompt, seed and sampler; without a guide, in float32, the model's own."""
        steered: dict[str, Any] = {"guide": dict(self.guide)} if self.guide else {}
        return self.variant.description | steered | ({} if self.dtype == "float32" else {"dtype": self.dtype})

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.description, sort_keys=True).encode()).hexdigest()

    def load(self, device: torch.device) -> LatentPolicy:
        """The model to paint with, its guide not yet on it."""
        return self.variant.load(device, replace(AS_IT_IS, dtype=self.dtype))
