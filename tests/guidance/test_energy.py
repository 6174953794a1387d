"""Reward guidance: its formula by hand, where it acts, and what it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from safediffusion.config import resolve
from safediffusion.errors import UserError
from safediffusion.guidance.energy import Energy, EnergySettings
from safediffusion.guidance.policy import Addressed, GuidedPolicy
from safediffusion.policies.latent import LatentPolicy, PolicySettings, load_policy
from safediffusion.process import from_scheduler
from safediffusion.rewards.callable import CallableReward
from safediffusion.rollout import walk
from safediffusion.types import Process, Prompt, Scores

PROMPTS = ("a red cat", "a blue dog")
GUARD = {"name": "guard", "reward": {"kind": "detection"}}


class Asked:
    """Red for a prompt that names red, blue for one that names blue."""

    differentiable = True

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        red, _, blue = images.mean((2, 3)).T
        return Scores(torch.where(torch.tensor(["red" in prompt.text for prompt in prompts]), red - blue, blue - red), {})


@pytest.fixture(scope="module")
def policy(tiny_pipeline: Path) -> LatentPolicy:
    return load_policy(tiny_pipeline, PolicySettings(train="full"))


def grid(policy: LatentPolicy, prediction: str = "epsilon", steps: int = 4) -> Process:
    return from_scheduler({**policy.scheduler_config, "prediction_type": prediction}, steps, eta=0.0)


def start(policy: LatentPolicy) -> Tensor:
    return torch.randn((2, *policy.sample_shape), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("through", [True, False])
def test_the_noise_is_shifted_against_the_gradient_of_the_reward(policy: LatentPolicy, prediction: str, through: bool) -> None:
    process, x, time = grid(policy, prediction), start(policy), torch.tensor([600, 600])
    condition = Addressed(policy.encode(PROMPTS), PROMPTS)
    found = Energy(process, Asked(), 3.0, through=through)(policy, x, time, condition, 2.0)

    abar = process.schedule.alphas_cumprod[600]
    here = x.clone().requires_grad_()
    plain = policy.predict(here, time, condition.tensor, 2.0)
    output = plain if through else plain.detach()
    epsilon = output if prediction == "epsilon" else abar.sqrt() * output + (1 - abar).sqrt() * here
    x0 = (here - (1 - abar).sqrt() * epsilon) / abar.sqrt()
    if not through and prediction == "v_prediction":
        x0 = (here - (1 - abar).sqrt() * epsilon.detach()) / abar.sqrt()
    (uphill,) = torch.autograd.grad(Asked()(policy.decode(x0), [Prompt(text) for text in PROMPTS]).total.sum(), here)
    wanted = -3.0 * (1 - abar).sqrt() * uphill
    moved = (found - plain.detach()) * (1 if prediction == "epsilon" else abar.sqrt())
    torch.testing.assert_close(moved, wanted, atol=1e-5, rtol=1e-3)
    assert uphill.abs().max() > 0


def test_a_reward_that_lost_its_gradient_is_refused(policy: LatentPolicy) -> None:
    detached = CallableReward(lambda images, prompts: images.mean((1, 2, 3)).detach(), "mine", differentiable=True)
    guided = GuidedPolicy(policy, Energy(grid(policy), detached, 1.0))
    with pytest.raises(UserError, match="guide.reward has no gradient to the pictures"):
        walk(guided, grid(policy), guided.encode(list(PROMPTS)), start(policy), 1.0)


def test_without_a_scale_it_is_the_plain_model(policy: LatentPolicy) -> None:
    process = grid(policy)
    guided = GuidedPolicy(policy, Energy(process, Asked(), 0.0))
    clean = walk(guided, process, guided.encode(PROMPTS), start(policy), 3.0).clean
    assert torch.equal(clean, walk(policy, process, policy.encode(PROMPTS), start(policy), 3.0).clean)


def test_pictures_score_higher_and_the_weights_stay(policy: LatentPolicy) -> None:
    process, before = grid(policy, steps=6), {name: weight.clone() for name, weight in policy.state().items()}

    def total(painter: LatentPolicy | GuidedPolicy) -> float:
        with torch.no_grad():
            clean = walk(painter, process, painter.encode(PROMPTS), start(policy), 1.0).clean
            return Asked()(painter.decode(clean), [Prompt(text) for text in PROMPTS]).total.sum().item()

    assert total(GuidedPolicy(policy, Energy(process, Asked(), 300.0))) > total(policy) + 0.05
    assert total(GuidedPolicy(policy, Energy(process, Asked(), 300.0, range=(0.999, 1.0)))) == pytest.approx(total(policy), abs=1e-6)
    assert all(torch.equal(weight, before[name]) and weight.grad is None for name, weight in policy.state().items())


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ({"kind": "jpeg"}, "of kind 'jpeg' has no gradient to be guided by"),
        ({"kind": "steering", "encoder": "pictograms", "steer": "unsafe"}, "nothing marks them here"),
        ({"kind": "combined", "parts": [GUARD | {"reward": {"kind": "steering", "encoder": "pictograms", "steer": "unsafe"}}]}, 'steer = "unsafe"'),
        ({"kind": "combined", "parts": [GUARD | {"prompts": "unsafe"}]}, 'guard counts for prompts = "unsafe", and nothing marks them here'),
        ({"kind": "combined", "parts": [GUARD | {"weight": 0.0}]}, "every weight is 0"),
        ({"kind": "combined", "parts": [GUARD, GUARD]}, "two parts are called 'guard'"),
        ({"kind": "combined", "parts": [GUARD], "normalise": "gdpo"}, 'guide.reward.normalise = "gdpo" compares pictures of one prompt'),
    ],
)
def test_rewards_that_cannot_guide(reward: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve(EnergySettings, {"kind": "reward", "reward": reward}).check()


def test_an_empty_range_is_refused() -> None:
    with pytest.raises(UserError, match=r"range: \[0.9, 0.1\] is empty"):
        resolve(EnergySettings, {"kind": "reward", "range": [0.9, 0.1]})
