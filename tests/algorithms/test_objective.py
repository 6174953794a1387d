"""Several rewards and constraints become one advantage per picture."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from safediffusion.algorithms.advantages import advantages
from safediffusion.algorithms.forward import Forward
from safediffusion.algorithms.lagrangian import AugmentedLagrangian
from safediffusion.algorithms.objective import Constraint, Objective, Weight
from safediffusion.algorithms.update import Learner
from safediffusion.errors import UserError
from safediffusion.types import Prompt, Scores

GROUP = 4
PROMPTS = tuple(prompt for prompt in (Prompt("a red circle"), Prompt("a knife", unsafe=True)) for _ in range(GROUP))
SETTINGS = {"floor": 0.02, "clip": 2.5, "least_spread": 1e-4, "slack": 0.0}
BUDGET = Constraint(cost="harm", budget=0.25, smooth=0.0)


@pytest.fixture
def scores() -> Scores:
    total = torch.tensor([0.1, 0.2, 0.3, 0.4, 1.0, 1.0, 1.0, 1.0])
    harm = torch.tensor([0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    return Scores(total, {"harm": harm, "right": total, "huge": 1000 * harm})


def test_without_constraints_it_is_the_advantage_of_the_total(scores: Scores) -> None:
    memory: dict[str, torch.Tensor] = {}
    found, metrics = Objective().worth(memory, scores, PROMPTS, GROUP, **SETTINGS)
    torch.testing.assert_close(found.value, advantages(scores.total, GROUP, 0.02, 2.5, 1e-4).value)
    assert found.alive.tolist() == [True, False]
    assert memory == {}
    assert metrics["reward/harm"] == 0.5


def test_a_cost_is_taken_off_for_its_own_prompts_once_it_is_over_the_budget(scores: Scores) -> None:
    memory: dict[str, torch.Tensor] = {}
    objective = Objective(constraints=(BUDGET,), lagrangian=AugmentedLagrangian(rho=2.0, hold=1))
    found, metrics = objective.worth(memory, scores, PROMPTS, GROUP, **SETTINGS)
    weight = 2.0 * (0.75 - 0.25)  # rho times the violation of the unsafe prompt's pictures; no multiplier yet
    torch.testing.assert_close(found.value[:GROUP], advantages(scores.total, GROUP, 0.02, 2.5, 1e-4).value[:GROUP])
    torch.testing.assert_close(found.value[GROUP:], -weight * torch.tensor([0.25, 0.25, -0.75, 0.25]))
    assert found.alive.tolist() == [True, True]  # the reward is the same for all of the second group, the cost is not
    assert metrics["dead_groups"] == 0
    assert {name: metrics[f"constraint/harm/{name}"] for name in ("cost", "weight", "multiplier")} == {"cost": 0.75, "weight": weight, "multiplier": weight}
    again, _ = objective.worth(memory, scores, PROMPTS, GROUP, **SETTINGS)  # the multiplier is remembered, and the violation is there still
    torch.testing.assert_close(again.value[GROUP:], 2 * found.value[GROUP:])


def test_normalised_together_the_advantage_is_that_of_the_reward_less_the_weighted_cost(scores: Scores) -> None:
    objective = Objective(constraints=(BUDGET,), lagrangian=AugmentedLagrangian(rho=2.0, hold=1, normalise="together"))
    found, metrics = objective.worth({}, scores, PROMPTS, GROUP, **SETTINGS)
    weight = metrics["constraint/harm/weight"]
    assert weight == 2.0 * (0.75 - 0.25)
    cost = scores.parts["harm"] * torch.tensor([0.0] * GROUP + [1.0] * GROUP)  # of the unsafe prompt's pictures alone
    torch.testing.assert_close(found.value, advantages(scores.total - weight * cost, GROUP, 0.02, 2.5, 1e-4).value)
    strict = Objective(constraints=(BUDGET,), lagrangian=AugmentedLagrangian(rho=1e3, hold=1, normalise="together"))
    most, _ = strict.worth({}, scores, PROMPTS, GROUP, **SETTINGS)
    assert most.value.view(-1, GROUP).square().mean(1).max() <= 1 + 1e-6  # however large the multiplier


def test_a_kept_budget_changes_nothing(scores: Scores) -> None:
    loose = Objective(constraints=(Constraint(cost="harm", budget=0.9),))
    found, metrics = loose.worth({}, scores, PROMPTS, GROUP, **SETTINGS)
    torch.testing.assert_close(found.value, Objective().worth({}, scores, PROMPTS, GROUP, **SETTINGS)[0].value)
    assert metrics["constraint/harm/weight"] == 0


def test_at_least_is_at_most_of_the_negative(scores: Scores) -> None:
    negative = Scores(scores.total, {"safe": -scores.parts["harm"]})
    most, least = (Objective(constraints=(constraint,)) for constraint in (BUDGET, Constraint(cost="safe", budget=-0.25, at="least", smooth=0.0)))
    one, metrics = most.worth({}, scores, PROMPTS, GROUP, **SETTINGS)
    other, said = least.worth({}, negative, PROMPTS, GROUP, **SETTINGS)
    torch.testing.assert_close(one.value, other.value)
    assert (metrics["constraint/harm/cost"], said["constraint/safe/cost"]) == (0.75, -0.75)


def test_the_cost_is_smoothed_over_iterations_and_prompts_of_another_class_leave_it(scores: Scores) -> None:
    objective, memory = Objective(constraints=(Constraint(cost="harm", budget=0.25, smooth=0.5),)), {}
    objective.worth(memory, scores, PROMPTS, GROUP, **SETTINGS)
    objective.worth(memory, scores[torch.arange(GROUP)], PROMPTS[:GROUP], GROUP, **SETTINGS)  # no unsafe prompt among them
    _, metrics = objective.worth(memory, Scores(scores.total, {"harm": torch.zeros(8)}), PROMPTS, GROUP, **SETTINGS)
    assert metrics["constraint/harm/cost"] == 0.375


def test_parts_are_normalised_apart(scores: Scores) -> None:
    objective = Objective(parts={"right": Weight(1.0), "huge": Weight(0.5, "unsafe")})
    found, _ = objective.worth({}, scores, PROMPTS, GROUP, **SETTINGS)
    right, huge = (advantages(scores.parts[name], GROUP, 0.02, 2.5, 1e-4).value for name in ("right", "huge"))
    torch.testing.assert_close(found.value[:GROUP], right[:GROUP])
    torch.testing.assert_close(found.value[GROUP:], 0.5 * huge[GROUP:])
    assert found.alive.tolist() == [True, True]


def test_the_sum_of_the_parts_is_standardised_over_the_batch(scores: Scores) -> None:
    weights = {"right": Weight(1.0), "huge": Weight(0.5)}
    (plain, _), (found, _) = (Objective(weights, over_batch=over).worth({}, scores, PROMPTS, GROUP, **SETTINGS) for over in (False, True))
    torch.testing.assert_close(found.value, (plain.value - plain.value.mean()) / (plain.value.std() + 1e-4))
    few = {"right": Weight(1.0)}  # in which the second group is dead
    (plain, _), (found, _) = (Objective(few, over_batch=over).worth({}, scores, PROMPTS, GROUP, **SETTINGS) for over in (False, True))
    torch.testing.assert_close(found.value[:GROUP], plain.value[:GROUP] / (plain.value[:GROUP].std() + 1e-4))
    assert found.value[GROUP:].tolist() == [0.0] * GROUP and found.alive.tolist() == [True, False]
    dead, _ = Objective(few, over_batch=True).worth({}, scores[torch.arange(GROUP, 2 * GROUP)], PROMPTS[GROUP:], GROUP, **SETTINGS)
    assert dead.value.tolist() == [0.0] * GROUP


def test_the_utility_has_the_gradient_of_the_augmented_lagrangian(scores: Scores) -> None:
    lagrangian = AugmentedLagrangian(rho=2.0, hold=1)
    objective, memory = Objective(constraints=(BUDGET,), lagrangian=lagrangian), {}
    objective.worth(memory, scores, PROMPTS, GROUP, **SETTINGS)
    harm = scores.parts["harm"].clone().requires_grad_()
    objective.utility(memory, Scores(scores.total, {"harm": harm}), PROMPTS).sum().backward()
    whole = scores.parts["harm"].double().requires_grad_()
    lagrangian.value((whole[GROUP:].mean() - 0.25)[None], lagrangian.start(1)).sum().backward()  # with the multiplier that was there when the cost was seen
    torch.testing.assert_close(harm.grad.double(), -GROUP * whole.grad)  # a sum over pictures, not the mean over those of the class


def test_a_constraint_weighs_what_it_weighs_beside_a_clipped_bonus(make_learner: Callable[..., Learner], gradient: Callable) -> None:
    """The gradient is linear in the weight, however large; clipped with the advantage it would stop growing."""
    prompts, found = (Prompt("a knife", unsafe=True), Prompt("a red cat")), []
    for rho in (0.0, 4000.0, 8000.0):
        learner = make_learner(eta=0.0)
        constraint = Constraint(cost="blue", budget=0.0, prompts="all", smooth=0.0)
        learner.objective = Objective(constraints=(constraint,), lagrangian=AugmentedLagrangian(update="ascent", rho=rho))
        Forward(group=4, times=1, diversity=0.01, slack=0.5, least_spread=0.0, benign_kl=0.0, unsafe_kl=0.0).step(learner, prompts, torch.Generator().manual_seed(0))
        found.append(gradient(learner))
    torch.testing.assert_close(found[2] - found[1], found[1] - found[0], rtol=0.01, atol=float((found[1] - found[0]).abs().max()) * 0.01)


def test_a_part_that_is_not_there(scores: Scores) -> None:
    with pytest.raises(UserError, match="no part 'blood'; its parts are total, harm"):
        Objective(constraints=(Constraint(cost="blood", budget=0.1),)).worth({}, scores, PROMPTS, GROUP, **SETTINGS)


def test_a_constraint_on_the_kl_raises_its_weight_until_the_policy_stays_near(make_learner: Callable[..., Learner]) -> None:
    prompts = (Prompt("a red cat"), Prompt("a knife", unsafe=True))
    algorithm = Forward(group=4, times=2, time_range=(0.02, 0.9), floor=0.02, benign_kl=0.0, unsafe_kl=0.0)
    ended = {}
    for budget in (None, 1e-4):
        learner = make_learner(lr=0.2, eta=0.0)
        if budget is not None:
            constraint = Constraint(cost="kl", budget=budget, smooth=0.0)
            learner.objective = Objective(constraints=(constraint,), lagrangian=AugmentedLagrangian(update="ascent", rho=100.0, rate=50.0))
        for seed in range(12):
            metrics = algorithm.step(learner, prompts, torch.Generator().manual_seed(seed))
        ended[budget] = metrics["kl"]
    assert ended[1e-4] < 0.5 * ended[None]
    assert metrics["constraint/kl/multiplier"] > 0
