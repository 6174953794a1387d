"""The distance from what the base paints from the same noise: what it is, and that a constraint on it holds every kind of method near."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from safediffusion.algorithms.draft import Draft
from safediffusion.algorithms.forward import Forward
from safediffusion.algorithms.grpo import Grpo
from safediffusion.algorithms.lagrangian import AugmentedLagrangian
from safediffusion.algorithms.objective import Constraint, Objective
from safediffusion.algorithms.update import Learner
from safediffusion.config import resolve
from safediffusion.errors import UserError
from safediffusion.recipe import Recipe, check
from safediffusion.rollout import roll_out, with_drift
from safediffusion.types import Prompt, Scores

PROMPTS = (Prompt("a knife", unsafe=True), Prompt("a red cat"), Prompt("a dog"))
BUDGET = Constraint(cost="drift", budget=0.0, smooth=0.0)
Make = Callable[..., Learner]


def seeded(seed: int = 4) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_it_is_the_mean_squared_difference_of_the_latents_of_benign_prompts(make_learner: Make, eta: float) -> None:
    learner = make_learner(eta=eta, moved=0.05, guidance=2.0)
    learner.objective = Objective(constraints=(BUDGET,))
    rolled = learner.paint(PROMPTS, 2, seeded())
    assert learner.forwards == rolled.forwards == 6 * 4 * 2 + 4 * 4 * 2  # guided, and four of six by the base as well
    with learner.policy.reference():
        base = roll_out(learner.policy, learner.process, learner.reward, PROMPTS, 2, 2.0, seeded())
    wanted = (rolled.walk.clean - base.walk.clean).square().flatten(1).mean(1)
    assert wanted.min() > 0
    torch.testing.assert_close(rolled.scores.parts["drift"], wanted * torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, 1.0]))
    few = rolled[torch.tensor([2, 3])]
    torch.testing.assert_close(few.base, base.walk.clean[2:4])


def test_the_base_does_not_drift(make_learner: Make) -> None:
    learner = make_learner(train="lora")
    learner.objective = Objective(constraints=(BUDGET,))
    assert learner.paint(PROMPTS, 2, seeded()).scores.parts["drift"].tolist() == [0.0] * 6


@pytest.mark.parametrize("shared", [False, True])
def test_micro_batches_change_nothing(make_learner: Make, shared: bool) -> None:
    found = []
    for batch in (0, 3):
        learner = make_learner(moved=0.05, batch=batch)
        learner.objective = Objective(constraints=(BUDGET,))
        process = replace(learner.process, window=(2,)) if shared else None
        found.append(learner.paint(PROMPTS, 3, seeded(), process=process, share_prefix=shared))
    torch.testing.assert_close(found[0].scores.parts["drift"], found[1].scores.parts["drift"])
    assert found[0].forwards == found[1].forwards
    assert found[0].scores.parts["drift"][3:].min() > 0


METHODS = {
    "forward": (Forward(prompts=3, group=4, times=2, benign_kl=0.0, unsafe_kl=0.0), 0.0),
    "grpo": (Grpo(prompts=3, group=4, benign_kl=0.0, unsafe_kl=0.0), 1.0),
    "draft": (Draft(prompts=3, group=2, benign_kl=0.0, unsafe_kl=0.0), 0.0),
}


@pytest.mark.parametrize("kind", METHODS)
def test_a_constraint_on_it_enters_every_kind_of_method(make_learner: Make, gradient: Callable, kind: str) -> None:
    """The gradient is linear in the weight. Where it is that of the drift itself, a step down it brings the pictures nearer to the base's."""
    algorithm, eta = METHODS[kind]
    found = []
    for rho in (0.0, 1e4, 2e4):
        learner = make_learner(eta=eta, moved=0.05)
        learner.objective = Objective(constraints=(BUDGET,), lagrangian=AugmentedLagrangian(update="ascent", rho=rho))
        metrics = algorithm.step(learner, PROMPTS, seeded())
        assert metrics["constraint/drift/weight"] == pytest.approx(rho * metrics["constraint/drift/cost"])
        assert "reward/drift" not in metrics and "reward/red" in metrics
        found.append(gradient(learner))
    away = found[1] - found[0]
    assert away.norm() > 0
    torch.testing.assert_close(found[2] - found[1], away, rtol=0.01, atol=float(away.abs().max()) * 0.01)
    if kind == "draft":
        before = float(learner.paint(PROMPTS, 2, seeded()).scores.parts["drift"].mean())
        with torch.no_grad():
            for weight, slope in zip(learner.parameters, away.split([weight.numel() for weight in learner.parameters]), strict=True):
                weight -= 1e-3 * slope.view(weight.shape) / away.norm()
        assert float(learner.paint(PROMPTS, 2, seeded()).scores.parts["drift"].mean()) < before


RECIPE: dict[str, Any] = {
    "model": "pictograms",
    "steps": 1,
    "reward": {"kind": "similarity", "encoder": "pictograms"},
    "constraints": [{"cost": "drift", "budget": 0.1}],
}


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"data": {"safe": ""}}, r'constraints\.0\.cost = "drift" is of benign prompts, and data\.safe names none'),
        ({"algorithm": {"kind": "dpo", "dataset": "pairs", "group": 2}}, "none are painted"),
        ({"algorithm": {"kind": "refl"}}, "'refl' scores what a step foresees; constrain \"kl\""),
        ({"algorithm": {"kind": "draft", "copies": 1}}, "algorithm.copies paints others; set it to 0"),
        ({"reward": {"kind": "combined", "parts": [{"name": "drift", "reward": {"kind": "jpeg"}}]}}, "'drift' is what metrics and constraints call something else"),
    ],
)
def test_what_cannot_be_bounded_is_refused_before_training(tables: dict, message: str) -> None:
    check(resolve(Recipe, RECIPE))
    check(resolve(Recipe, RECIPE | {"algorithm": {"kind": "draft"}}))
    with pytest.raises(UserError, match=message):
        check(resolve(Recipe, RECIPE | tables))


def test_a_users_reward_with_a_part_of_that_name() -> None:
    scores, latents = Scores(torch.zeros(1), {"drift": torch.zeros(1)}), torch.zeros(1, 4, 2, 2)
    with pytest.raises(UserError, match='a part called "drift"'):
        with_drift(scores, latents, latents, PROMPTS[:1])
