"""GRPO in windows: which steps add noise and are trained, and what that costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from safediffusion.algorithms.grpo import Grpo, Window
from safediffusion.algorithms.update import Learner
from safediffusion.rollout import roll_out
from safediffusion.types import Prompt

PROMPTS = (Prompt("a red cat"), Prompt("a knife", unsafe=True))
PLAIN = {"prompts": 2, "group": 4, "benign_kl": 0.0, "unsafe_kl": 0.0, "floor": 1e-3}
Make = Callable[..., Learner]


def seeded(seed: int = 4) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_fixed_window_stays_and_a_sliding_one_goes_round() -> None:
    assert [Window(start=1, length=2).at(i, 6, seeded()) for i in (0, 50)] == [(1, 2)] * 2
    sliding = Window(start=1, length=2, schedule="sliding", hold=3)
    assert [sliding.at(i, 5, seeded())[0] for i in range(12)] == [1, 1, 1, 2, 2, 2, 3, 3, 3, 1, 1, 1]


def test_a_random_window_reaches_every_place_from_its_start_on() -> None:
    window = Window(start=1, length=2, schedule="random")
    assert {window.at(0, 5, seeded(seed)) for seed in range(50)} == {(1, 2), (2, 3), (3, 4)}


def test_only_the_window_is_noisy_and_trained_and_its_ratio_starts_at_one(make_learner: Make) -> None:
    learner = make_learner(steps=6, guidance=3.0)
    metrics = Grpo(**PLAIN, window=Window(start=1, length=2), train_guidance="both").step(learner, PROMPTS, seeded())
    assert metrics["ratio/distance"] == 0.0 and metrics["grad_norm"] > 0
    assert learner.forwards == 8 * (6 * 2 + 2 * 3 * 2)  # guided rollout of six steps, guided training of two


def test_a_shared_prefix_is_walked_once(make_learner: Make) -> None:
    learner = make_learner(steps=6)
    process = replace(learner.process, window=(2, 3))
    rolled = roll_out(learner.policy, process, learner.reward, PROMPTS, 4, 1.0, seeded(), True, share_prefix=True)
    groups = [state.view(2, 4, -1) for state in rolled.walk.states]
    for state in groups[:3]:
        assert torch.equal(state, state[:, :1].expand_as(state))
    assert (groups[3][:, 0] != groups[3][:, 1]).all()
    assert (groups[0][0] != groups[0][1]).any()
    assert rolled.forwards == 2 * 2 + 8 * 4
    parts = roll_out(learner.policy, process, learner.reward, PROMPTS, 4, 1.0, seeded(), True, batch=4, share_prefix=True)
    torch.testing.assert_close(parts.walk.clean, rolled.walk.clean, atol=1e-5, rtol=1e-5)


def test_a_shared_start_without_a_prefix_costs_what_it_did(make_learner: Make) -> None:
    learner = make_learner(steps=4)
    Grpo(**PLAIN, window=Window(start=0, length=1), share_prefix=True).step(learner, PROMPTS, seeded())
    assert learner.forwards == 8 * (4 + 3)


def test_a_subset_of_the_noisy_steps_is_trained(make_learner: Make) -> None:
    learner = make_learner(steps=8)
    algorithm = Grpo(**PLAIN, train_steps=2, drop_last=0)
    chosen = {algorithm.trained_steps(learner.process, seeded(seed)) for seed in range(60)}
    assert {len(steps) for steps in chosen} == {2} and {step for steps in chosen for step in steps} == set(range(7))
    algorithm.step(learner, PROMPTS, seeded())
    assert learner.forwards == 8 * (8 + 2 * 3)


def test_stopped_guidance_has_the_value_of_guidance_and_the_gradient_of_one_branch(make_learner: Make, gradient: Callable) -> None:
    learner = make_learner()
    policy, x, time = learner.policy, torch.randn(4, *learner.policy.sample_shape, generator=seeded()), torch.full((4,), 500)
    condition = policy.encode(["a red cat"] * 4)
    direction = torch.randn(x.shape, generator=seeded(1))

    def pulled(scale: float = 1.0, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
        learner.optimizer.zero_grad()
        output = policy.predict(x, time, condition, **options)
        (scale * (output * direction).sum()).backward()
        return output.detach(), gradient(learner)

    value, stopped = pulled(guidance=3.0, stop=True)
    both, through = pulled(guidance=3.0)
    _, single = pulled(scale=3.0, guidance=1.0)
    torch.testing.assert_close(value, both, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stopped, single, atol=1e-4, rtol=1e-3)
    assert (through - stopped).norm() > 0.1 * stopped.norm()


@pytest.mark.parametrize(("train", "each"), [("off", 3), ("stop", 4), ("both", 6)])
def test_what_guidance_in_training_costs(make_learner: Make, train: str, each: int) -> None:
    learner = make_learner(guidance=2.0)
    metrics = Grpo(**PLAIN, train_guidance=train).step(learner, PROMPTS, seeded())
    assert learner.forwards == 8 * (4 * 2 + 2 * each)
    assert metrics["ratio/distance"] < 1e-6
