"""Diffusion-KTO against its formula (arXiv 2404.04465, equation 8), computed apart from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest
import torch

from safediffusion.algorithms.advantages import advantages
from safediffusion.algorithms.kto import Kto
from safediffusion.algorithms.objective import Constraint
from safediffusion.algorithms.update import Learner
from safediffusion.errors import UserError
from safediffusion.rollout import Rollout, roll_out
from safediffusion.types import Prompt, Scores

PROMPTS = (Prompt("a red cat"), Prompt("a knife", unsafe=True))
Make = Callable[..., Learner]


def plain(**options: object) -> Kto:
    return Kto(**({"prompts": 2, "group": 4, "times": 2, "beta": 50.0, "benign_kl": 0.0, "unsafe_kl": 0.0} | options))


def painted(learner: Learner) -> Rollout:
    return roll_out(learner.policy, learner.process, learner.reward, PROMPTS, 4, 1.0, torch.Generator().manual_seed(4))


def weighed(good: list[bool], desirable: float, undesirable: float) -> torch.Tensor:
    """Of each group half the weight is that of the good ones, half that of the others."""
    weight = []
    for group in (good[:4], good[4:]):
        count = sum(group)
        weight += [desirable * 2 / count if each else undesirable * 2 / (4 - count) for each in group]
    return torch.tensor(weight)


@pytest.mark.parametrize("way", [1, -1])
def test_the_gradient_is_that_of_the_utility(make_learner: Make, gradient: Callable, witnessed: Callable, look: Callable, way: int) -> None:
    learner = make_learner(eta=0.0, moved=0.01 * way)
    rolled = painted(learner)
    metrics, seen = witnessed(learner, plain(desirable=1.5, undesirable=0.5), PROMPTS)
    got = gradient(learner)
    total = rolled.scores.total.view(2, 4)
    good = (total > total.mean(1, keepdim=True)).flatten().tolist()
    sign, weight = torch.tensor([1.0 if each else -1.0 for each in good]), weighed(good, 1.5, 0.5)
    learner.optimizer.zero_grad()
    loss = 0.0
    for noised in seen:
        there = look(learner, rolled.condition, noised)
        own = -50.0 * (there.error - there.base)
        point = max(float(own.detach().mean()), 0.0)
        each = (weight * (1 - 1 / (1 + torch.exp(-sign * (own - point))))).mean() * 4 / 50.0 / 2
        each.backward()
        loss += float(each.detach())
    assert (got - gradient(learner)).norm() <= 1e-3 * got.norm()
    assert got.norm() > 0
    assert metrics["loss"] == pytest.approx(loss, rel=1e-4)
    assert metrics["desirable"] == sum(good) / 8


def test_at_the_base_it_is_the_difference_of_the_errors(make_learner: Make, gradient: Callable, witnessed: Callable, look: Callable) -> None:
    """Whatever beta is: so that the pull to the base weighs alike."""
    learner = make_learner(train="lora", eta=0.0)
    rolled = painted(learner)
    for beta in (1.0, 5000.0):
        _, seen = witnessed(learner, plain(times=1, beta=beta), PROMPTS)
        got = gradient(learner)
        total = rolled.scores.total.view(2, 4)
        good = (total > total.mean(1, keepdim=True)).flatten().tolist()
        weight = weighed(good, 1.0, 1.0) * torch.tensor([1.0 if each else -1.0 for each in good])
        learner.optimizer.zero_grad()
        (look(learner, rolled.condition, seen[0]).error * weight).mean().backward()
        assert (got - gradient(learner)).norm() <= 1e-3 * got.norm()


def test_a_threshold_labels_by_the_total(make_learner: Make, witnessed: Callable) -> None:
    learner = make_learner(eta=0.0)
    middle = float(painted(learner).scores.total.median())
    assert witnessed(learner, plain(threshold=middle), PROMPTS)[0]["desirable"] == 0.5
    assert witnessed(learner, plain(threshold=-100.0), PROMPTS)[0]["desirable"] == 1.0


def test_pictures_that_are_worth_the_same_have_no_label(make_learner: Make, gradient: Callable, witnessed: Callable) -> None:
    learner = make_learner(eta=0.0, moved=0.01)
    witnessed(learner, plain(least_spread=0.0), (Prompt("nothing"),) * 2)
    assert gradient(learner).norm() == 0


class Same:
    """Every picture is worth as much, a number whose mean over a group is rounded."""

    differentiable = True

    def __call__(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> Scores:
        return Scores(torch.full((len(images),), 0.1), {})


def test_what_rounding_leaves_of_equal_rewards_is_no_label(make_learner: Make, gradient: Callable, witnessed: Callable) -> None:
    learner = make_learner(eta=0.0, moved=0.01)
    learner.reward = Same()
    worth = advantages(torch.full((14,), 0.1), 7, floor=1e-3, clip=2.5, least_spread=0.0).value
    assert 0 < worth.abs().max() < 1e-4
    metrics, _ = witnessed(learner, plain(group=7, floor=1e-3, least_spread=0.0), PROMPTS)
    assert (metrics["desirable"], metrics["loss"]) == (0.0, 0.0)
    assert gradient(learner).norm() == 0


def test_what_cannot_work_together_is_refused() -> None:
    recipe = SimpleNamespace(constraints=(Constraint(cost="kl", budget=0.1), Constraint(cost="safety", budget=0.1)))
    Kto().check(recipe)
    with pytest.raises(UserError, match="which no constraint enters"):
        Kto(threshold=0.5).check(recipe)
    with pytest.raises(UserError, match="both 0"):
        Kto(desirable=0.0, undesirable=0.0).check(recipe)
