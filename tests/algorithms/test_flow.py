"""Every method on a rectified flow, through the same files: the process is all that is different."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from safediffusion.algorithms.advantages import advantages
from safediffusion.algorithms.d3po import D3po
from safediffusion.algorithms.ddpo import Ddpo
from safediffusion.algorithms.dpo import Dpo
from safediffusion.algorithms.dpok import Dpok
from safediffusion.algorithms.draft import Draft
from safediffusion.algorithms.forward import Forward
from safediffusion.algorithms.grpo import Grpo, Window
from safediffusion.algorithms.kto import Kto
from safediffusion.algorithms.raft import Raft
from safediffusion.algorithms.refl import Refl
from safediffusion.algorithms.rwr import Rwr
from safediffusion.algorithms.update import Learner
from safediffusion.rollout import roll_out
from safediffusion.types import Prompt

PROMPTS = (Prompt("a red cat"), Prompt("a knife", unsafe=True))
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
GROUPS = {"prompts": 2, "group": 4}
METHODS = {
    "grpo": (Grpo(**GROUPS, train_guidance="both"), 1.0),
    "window": (Grpo(**GROUPS, window=Window(start=0, length=1), share_prefix=True), 1.0),
    "ddpo": (Ddpo(**GROUPS), 1.0),
    "dpok": (Dpok(**GROUPS), 0.7),
    "d3po": (D3po(**GROUPS), 1.0),
    "forward": (Forward(**GROUPS), 0.0),
    "rwr": (Rwr(**GROUPS), 0.0),
    "raft": (Raft(**GROUPS), 0.0),
    "dpo": (Dpo(**GROUPS), 0.0),
    "kto": (Kto(**GROUPS), 0.0),
    "draft": (Draft(**GROUPS, last=2, copies=0), 1.0),
    "copies": (Draft(**GROUPS, copies=1), 0.0),
    "refl": (Refl(**GROUPS, late=1.0), 0.0),
}


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(4)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_finite_gradient(make_learner: Callable[..., Learner], gradient: Callable[[Learner], Tensor], name: str) -> None:
    algorithm, eta = METHODS[name]
    learner = make_learner(scheduler=FLOW, steps=3, eta=eta, guidance=2.0, batch=4, moved=0.01)
    metrics = algorithm.step(learner, PROMPTS, seeded())
    assert metrics.get("ratio/distance", 0.0) == 0.0  # no update yet
    assert gradient(learner).isfinite().all() and gradient(learner).norm() > 0


def test_forward_matches_noise_at_shifted_times(make_learner: Callable[..., Learner], gradient: Callable[[Learner], Tensor]) -> None:
    """A |e^ - e|^2 by hand, which for a velocity v^ is A (1 - sigma)^2 |v^ - (e - x_0)|^2."""
    learner = make_learner(scheduler=FLOW, eta=0.0)
    options: dict[str, Any] = {**GROUPS, "times": 1, "updates": 1, "benign_kl": 0.0, "unsafe_kl": 0.0, "diversity": 0.0, "floor": 1e-3, "time_range": (0.1, 0.9)}
    Forward(**options).step(learner, PROMPTS, seeded())
    found = gradient(learner)

    learner.optimizer.zero_grad()
    generator = seeded()
    rolled = roll_out(learner.policy, learner.process, learner.reward, PROMPTS, 4, 1.0, generator)
    gain = advantages(rolled.scores.total, 4, 1e-3, 2.5, 1e-4).value
    torch.randperm(1, generator=generator)
    share = 0.1 + 0.8 * torch.rand(2, generator=generator)
    sigma = (3 * share / (1 + 2 * share)).repeat_interleave(4).view(-1, 1, 1, 1)
    noise = torch.randn((2, *learner.policy.sample_shape), generator=generator).repeat_interleave(4, 0)
    clean = rolled.walk.clean
    velocity = learner.policy.predict((1 - sigma) * clean + sigma * noise, 1000 * sigma.flatten(), rolled.condition)
    error = ((1 - sigma) * (velocity - noise + clean)).square().flatten(1).mean(1)
    (gain * error).mean().backward()
    wanted = gradient(learner)
    assert (found - wanted).norm() < 1e-3 * wanted.norm() and wanted.norm() > 0
