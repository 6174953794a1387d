"""Randomness as a function of identity, never of history: resuming is exact, and an image does not depend on its batch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import torch
from torch import Tensor


def derive(*parts: int | str) -> int:
    """A seed of 63 bits that depends on every part, its type and its place: ("a", 1), ("a", "1") and ("a1",) differ."""
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*parts: int | str, device: str | torch.device = "cpu") -> torch.Generator:
    """A fresh generator for whatever the parts name, such as ("rollout", seed, rank, step)."""
    return torch.Generator(device).manual_seed(derive(*parts))


def noise_for(items: Sequence[tuple[str, int]], shape: Sequence[int]) -> Tensor:
    """Standard-normal `(B, *shape)` on the CPU, each row a function of its (prompt text, seed) alone."""
    rows = [torch.randn(*shape, generator=generator("noise", text, seed)) for text, seed in items]
    return torch.stack(rows) if rows else torch.empty(0, *shape)
