"""Guides on a rectified flow: the same formulas, and nothing to lead in noise alone, where its walk starts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from safediffusion.guidance.energy import Energy
from safediffusion.guidance.policy import Addressed, GuidedPolicy
from safediffusion.guidance.sld import SldSettings
from safediffusion.guided import guided
from safediffusion.policies.latent import LatentPolicy, PolicySettings, load_policy
from safediffusion.process import from_scheduler
from safediffusion.rewards.callable import CallableReward
from safediffusion.rollout import walk

PROMPTS = ("a red cat", "a blue dog")
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "use_dynamic_shifting": True}


@pytest.fixture(scope="module")
def policy(tiny_pipeline: Path) -> LatentPolicy:
    policy = load_policy(tiny_pipeline, PolicySettings(train="full"))
    policy.scheduler_config = FLOW
    return policy


def start(policy: LatentPolicy) -> Tensor:
    return torch.randn((2, *policy.sample_shape), generator=torch.Generator().manual_seed(0))


def test_the_noise_is_shifted_against_the_gradient_of_the_reward(policy: LatentPolicy) -> None:
    process = from_scheduler(FLOW, 4, eta=0.0, tokens=policy.tokens())
    reward = CallableReward(lambda images, prompts: images.mean((1, 2, 3)), "brightness", differentiable=True)
    guide, x, condition = Energy(process, reward, 3.0), start(policy), Addressed(policy.encode(PROMPTS), PROMPTS)
    time = torch.full((2,), 600.0)
    here = x.clone().requires_grad_()
    plain = policy.predict(here, time, condition.tensor)
    (uphill,) = torch.autograd.grad(policy.decode(here - 0.6 * plain).mean((1, 2, 3)).sum(), here)
    torch.testing.assert_close(0.4 * (guide(policy, x, time, condition, 1.0) - plain.detach()), -3.0 * 0.6 * uphill, atol=1e-6, rtol=1e-3)
    assert uphill.abs().max() > 0

    noise_alone = torch.full((2,), 1000.0)
    assert torch.equal(guide(policy, x, noise_alone, condition, 1.0), policy.predict(x, noise_alone, condition.tensor))


def test_safe_latent_diffusion_leaves_noise_alone_to_the_model_and_then_leads(policy: LatentPolicy) -> None:
    painter = guided(policy, SldSettings(level="max", concept="a knife"), "cpu")
    process = from_scheduler(FLOW, 4, eta=0.0, tokens=policy.tokens())

    def states(painted: LatentPolicy | GuidedPolicy) -> tuple[Tensor, ...]:
        return walk(painted, process, painted.encode(PROMPTS), start(policy), 2.0, remember=True).states

    led, plain = states(painter), states(policy)
    torch.testing.assert_close(led[1], plain[1], atol=1e-5, rtol=1e-5)
    assert led[-1].isfinite().all() and not torch.allclose(led[-1], plain[-1], atol=1e-4)
