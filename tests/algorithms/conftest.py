"""A learner on the tiny pipeline, and rewards that a random model can climb."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from safediffusion.algorithms.update import Learner
from safediffusion.policies.latent import PolicySettings, load_policy
from safediffusion.process.diffusion import Diffusion
from safediffusion.types import Prompt, Scores


class Colours:
    """Red for a benign prompt, blue for an unsafe one; nothing at all for a prompt that says so."""

    differentiable = True

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        red, _, blue = images.mean((2, 3)).T
        total = torch.where(torch.tensor([prompt.unsafe for prompt in prompts]), blue - red, red - blue)
        total = total * torch.tensor([prompt.text != "nothing" for prompt in prompts])
        return Scores(total, {"red": red, "blue": blue}, torch.nn.functional.normalize(images.flatten(1)))


@pytest.fixture
def make_learner(tiny_pipeline: Path) -> Callable[..., Learner]:
    """`make_learner(...)` is a fresh learner. At lr 0 a step leaves its unclipped gradient behind and nothing else."""

    def make(
        *, train: str = "full", lr: float = 0.0, steps: int = 4, eta: float = 1.0, guidance: float = 1.0, batch: int = 0, moved: float = 0.0, prediction: str = "epsilon"
    ) -> Learner:
        policy = load_policy(tiny_pipeline, PolicySettings(train=train))
        with torch.no_grad():  # away from the base, where the KL has a gradient
            for i, weight in enumerate(policy.parameters()):
                weight += moved * torch.randn(weight.shape, generator=torch.Generator().manual_seed(i))
        return Learner(
            policy=policy,
            process=Diffusion.from_scheduler({**policy.scheduler_config, "prediction_type": prediction}, steps, eta),
            reward=Colours(),
            optimizer=torch.optim.SGD(policy.parameters(), lr=lr),
            accelerator=Accelerator(),
            parameters=tuple(policy.parameters()),
            guidance=guidance,
            batch=batch,
            max_grad_norm=1e9,
        )

    return make


@pytest.fixture
def gradient() -> Callable[[Learner], Tensor]:
    """All gradients of a learner's parameters in one vector."""

    def flat(learner: Learner) -> Tensor:
        return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in learner.parameters])

    return flat


@pytest.fixture
def weights() -> Callable[[Learner], Tensor]:
    """A copy of a learner's parameters in one vector."""
    return lambda learner: torch.cat([p.detach().flatten() for p in learner.parameters])
