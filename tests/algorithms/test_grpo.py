"""GRPO against its formula (docs/method.md section 4), computed apart from it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from safediffusion.algorithms.advantages import advantages
from safediffusion.algorithms.grpo import Grpo
from safediffusion.algorithms.update import Learner
from safediffusion.rollout import Rollout, roll_out
from safediffusion.types import Prompt

PROMPTS = (Prompt("a red cat"), Prompt("a knife", unsafe=True))
PLAIN = {"prompts": 2, "group": 4, "benign_kl": 0.0, "unsafe_kl": 0.0, "drop_last": 0, "normalise_ratio": False, "floor": 1e-3}
Make = Callable[..., Learner]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(4)


def painted(learner: Learner, group: int, prompts: tuple[Prompt, ...] = PROMPTS) -> Rollout:
    """What a step with the same generator paints first."""
    return roll_out(learner.policy, learner.process, learner.reward, prompts, group, learner.guidance, seeded(), True, learner.batch)


def mean_of(learner: Learner, rollout: Rollout, step: int, guidance: float = 1.0) -> Tensor:
    """The mean of the next latent by DDIM's own formula for epsilon, eta 1: `(B, D)`."""
    process, x = learner.process, rollout.walk.states[step]
    time = int(process.times[step])
    here, there = (float(process.schedule.alphas_cumprod[int(process.times[i])]) for i in (step, step + 1))
    variance = (1 - there) / (1 - here) * (1 - here / there)
    epsilon = learner.policy.predict(x, torch.full((len(x),), time), rollout.condition, guidance)
    clean = (x - (1 - here) ** 0.5 * epsilon) / here**0.5
    return (there**0.5 * clean + (1 - there - variance) ** 0.5 * epsilon).flatten(1)


def log_prob(learner: Learner, rollout: Rollout, step: int, guidance: float = 1.0) -> Tensor:
    normal = torch.distributions.Normal(mean_of(learner, rollout, step, guidance), learner.process.steps[step].std)
    return normal.log_prob(rollout.walk.states[step + 1].flatten(1)).sum(1)


def close(one: Tensor, other: Tensor, tolerance: float = 1e-3) -> bool:
    return bool((one - other).norm() <= tolerance * other.norm())


# The ratio


@pytest.mark.parametrize("batch", [0, 4])
def test_the_ratio_is_exactly_one_before_the_first_update(make_learner: Make, batch: int) -> None:
    learner = make_learner(guidance=3.0, batch=batch)
    metrics = Grpo(**PLAIN, train_guidance="both").step(learner, PROMPTS, seeded())
    assert metrics["ratio/distance"] == 0.0
    assert metrics["ratio/clipped"] == 0.0


def test_the_ratio_leaves_one_after_the_first_update(make_learner: Make) -> None:
    still, moving = make_learner(guidance=3.0), make_learner(guidance=3.0, lr=1.0)
    algorithm = Grpo(**PLAIN, train_guidance="both", updates=2)
    # Two groups were painted together and are trained one by one, which rounds otherwise: far inside the clip range.
    assert algorithm.step(still, PROMPTS, seeded())["ratio/distance"] < 1e-6
    metrics = algorithm.step(moving, PROMPTS, seeded())
    assert metrics["ratio/distance"] > 1e-4
    assert 0 < metrics["ratio/clipped"] <= 0.5  # in the second update only


# The gradient


@pytest.mark.parametrize("drop_last", [0, 1, 2])
@pytest.mark.parametrize("normalise", [False, True])
def test_the_gradient_is_that_of_the_weighted_log_probability(make_learner: Make, gradient: Callable, drop_last: int, normalise: bool) -> None:
    learner = make_learner()
    algorithm = Grpo(**(PLAIN | {"drop_last": drop_last, "normalise_ratio": normalise}))
    algorithm.step(learner, PROMPTS, seeded())
    got = gradient(learner)

    rollout = painted(learner, 4)
    gain = advantages(rollout.scores.total, 4, 1e-3, 2.5, 1e-4).value
    steps = [0, 1, 2][: 3 - drop_last]
    assert algorithm.trained_steps(learner.process, seeded()) == tuple(steps)
    learner.optimizer.zero_grad()
    for step in steps:
        scale = 1 / learner.process.sensitivity(step) if normalise else 1.0
        (-(gain * log_prob(learner, rollout, step)).sum() * scale / 256 / (8 * len(steps))).backward()
    assert close(got, gradient(learner))


def test_the_kl_pulls_each_class_by_its_own_weight(make_learner: Make, gradient: Callable) -> None:
    learner = make_learner(moved=0.01)
    metrics = Grpo(**(PLAIN | {"benign_kl": 70.0, "unsafe_kl": 20.0})).step(learner, PROMPTS, seeded())
    got, rollout = gradient(learner), painted(learner, 4)
    learner.optimizer.zero_grad()
    Grpo(**PLAIN).step(learner, PROMPTS, seeded())
    without = gradient(learner)

    learner.optimizer.zero_grad()
    pull, total = torch.tensor([70.0] * 4 + [20.0] * 4), 0.0
    for step in range(3):
        mean = mean_of(learner, rollout, step)
        with learner.policy.reference():
            base = mean_of(learner, rollout, step)
        kl = (mean - base).square().sum(1) / (2 * learner.process.steps[step].std ** 2) / 256
        ((pull * kl).sum() / 24).backward()
        total += float(kl.detach().sum()) / 24
    assert metrics["kl"] == pytest.approx(total, rel=1e-3)
    assert close(got - without, gradient(learner))


@pytest.mark.parametrize("train", ["full", "lora"])
def test_the_kl_is_zero_at_the_start_and_then_pulls_back(make_learner: Make, train: str) -> None:
    strong = Grpo(**(PLAIN | {"benign_kl": 1.0, "unsafe_kl": 1.0}))
    assert strong.step(make_learner(train=train), PROMPTS, seeded())["kl"] == 0.0

    away = make_learner(train=train, lr=1e-3, moved=0.02)
    heavy = Grpo(**(PLAIN | {"benign_kl": 1e4, "unsafe_kl": 1e4}))
    away.max_grad_norm = 1.0
    distances = [heavy.step(away, PROMPTS, seeded())["kl"] for _ in range(2)]
    assert distances[0] > distances[1] > 0


def test_an_update_makes_better_pictures_likelier(make_learner: Make) -> None:
    learner = make_learner(lr=1e-2)
    learner.max_grad_norm = 1.0
    rollout = painted(learner, 4)
    gain = advantages(rollout.scores.total, 4, 1e-3, 2.5, 1e-4).value
    before = sum(log_prob(learner, rollout, step).detach() for step in range(3))
    Grpo(**PLAIN).step(learner, PROMPTS, seeded())
    after = sum(log_prob(learner, rollout, step).detach() for step in range(3))
    assert float((gain * (after - before)).sum()) > 0


# Groups


def test_dead_groups_are_left_out(make_learner: Make, gradient: Callable) -> None:
    prompts, learner = (Prompt("nothing"), PROMPTS[1]), make_learner()
    metrics = Grpo(**PLAIN).step(learner, prompts, seeded())
    got, rollout = gradient(learner), painted(learner, 4, prompts)
    assert metrics["dead_groups"] == 0.5
    gain = advantages(rollout.scores.total, 4, 1e-3, 2.5, 1e-4).value
    learner.optimizer.zero_grad()
    for step in range(3):
        (-(gain * log_prob(learner, rollout, step))[4:].sum() / 256 / (4 * 3)).backward()
    assert close(got, gradient(learner))


def test_nothing_moves_when_all_groups_are_dead(make_learner: Make, weights: Callable) -> None:
    learner = make_learner(lr=1.0, moved=0.01)
    before = weights(learner)
    metrics = Grpo(prompts=2, group=2).step(learner, (Prompt("nothing"),) * 2, seeded())
    assert metrics["dead_groups"] == 1.0
    assert metrics["grad_norm"] == metrics["kl"] == metrics["loss"] == 0.0
    assert torch.equal(weights(learner), before)


def test_micro_batches_do_not_change_the_step(make_learner: Make, gradient: Callable) -> None:
    whole, parts = make_learner(moved=0.01), make_learner(moved=0.01, batch=3)
    metrics = [Grpo(prompts=2, group=4).step(learner, PROMPTS, seeded()) for learner in (whole, parts)]
    assert close(gradient(parts), gradient(whole))
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-3, abs=1e-6)
    assert whole.forwards == parts.forwards


def test_every_forward_is_counted(make_learner: Make) -> None:
    learner = make_learner(guidance=3.0)
    Grpo(**(PLAIN | {"benign_kl": 0.5})).step(learner, PROMPTS, seeded())
    assert learner.forwards == 8 * 4 * 2 + 8 * 3 * (3 + 1)  # guided rollout; forward, twice for the backward, reference


def test_the_setting_of_the_paper_runs(make_learner: Make, weights: Callable) -> None:
    learner = make_learner(guidance=5.0, lr=1e-5, batch=8)
    learner.optimizer = torch.optim.AdamW(learner.parameters, lr=1e-5, weight_decay=1e-4)
    learner.max_grad_norm = 1.0
    before = weights(learner)
    paper = Grpo(prompts=1, group=16, train_guidance="both", drop_last=0, normalise_ratio=False, clip_range=1e-4, floor=1e-8, benign_kl=0.0, unsafe_kl=0.0)
    metrics = paper.step(learner, PROMPTS[1:], seeded())
    assert metrics["ratio/distance"] == 0.0
    assert metrics["reward/total"] == pytest.approx(float(painted(make_learner(guidance=5.0), 16, PROMPTS[1:]).scores.total.mean()), abs=1e-5)
    assert 0 < float((weights(learner) - before).abs().max()) < 2e-5
