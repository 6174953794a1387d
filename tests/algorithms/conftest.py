"""A learner on the tiny pipeline, and rewards that a random model can climb."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from safediffusion.algorithms.update import Learner
from safediffusion.policies.latent import PolicySettings, load_policy
from safediffusion.process import from_scheduler
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
    """`make_learner(...)` is a fresh learner. At lr 0 a step leaves its unclipped gradient behind and nothing else.

    With a `scheduler` of another family's its network is taken to be of that family.
    """

    def make(
        *,
        train: str = "full",
        lr: float = 0.0,
        steps: int = 4,
        eta: float = 1.0,
        guidance: float = 1.0,
        batch: int = 0,
        moved: float = 0.0,
        prediction: str = "epsilon",
        scheduler: dict[str, Any] | None = None,
    ) -> Learner:
        policy = load_policy(tiny_pipeline, PolicySettings(train=train))
        with torch.no_grad():  # away from the base, where the KL has a gradient
            for i, weight in enumerate(policy.parameters()):
                weight += moved * torch.randn(weight.shape, generator=torch.Generator().manual_seed(i))
        return Learner(
            policy=policy,
            process=from_scheduler(scheduler or {**policy.scheduler_config, "prediction_type": prediction}, steps, eta),
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


@dataclass
class Witness:
    """A process that remembers what was noised: clean latents, noise and times."""

    inner: Any
    seen: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def noised(self, clean: Tensor, noise: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        self.seen.append((clean, noise, time))
        return self.inner.noised(clean, noise, time)


@dataclass(frozen=True)
class Look:
    """Pictures at one noise level: the error of the policy's noise, with its graph, that of the base's, and the distance between the two, all `(M,)`."""

    clean: Tensor
    noise: Tensor
    time: Tensor
    error: Tensor
    base: Tensor
    kl: Tensor


@pytest.fixture
def witnessed() -> Callable[..., tuple[dict[str, float], list[tuple[Tensor, Tensor, Tensor]]]]:
    """`witnessed(learner, algorithm, prompts)` takes a step: its metrics, and what it noised."""

    def step(learner: Learner, algorithm: Any, prompts: Sequence[Prompt]) -> tuple[dict[str, float], list[tuple[Tensor, Tensor, Tensor]]]:
        process, learner.process = learner.process, Witness(learner.process)
        metrics = algorithm.step(learner, prompts, torch.Generator().manual_seed(4))
        seen, learner.process = learner.process.seen, process
        return metrics, seen

    return step


@pytest.fixture
def look() -> Callable[[Learner, Tensor, tuple[Tensor, Tensor, Tensor]], Look]:
    """`look(learner, condition, noised)`: an epsilon-predicting policy and its base at what was noised, by hand."""

    def at(learner: Learner, condition: Tensor, noised: tuple[Tensor, Tensor, Tensor]) -> Look:
        clean, noise, time = noised
        abar = learner.process.schedule.alphas_cumprod[time].view(-1, 1, 1, 1)
        x = abar.sqrt() * clean + (1 - abar).sqrt() * noise
        said = learner.policy.predict(x, time, condition)
        with torch.no_grad(), learner.policy.reference():
            base = learner.policy.predict(x, time, condition)
        errors = [(each - noise).square().flatten(1).mean(1) for each in (said, base)]
        return Look(clean, noise, time, *errors, (said - base).square().flatten(1).mean(1))

    return at
