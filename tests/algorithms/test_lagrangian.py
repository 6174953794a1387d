"""The augmented Lagrangian: its identities, and how its multipliers end where they are known."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from safediffusion.algorithms.lagrangian import AugmentedLagrangian, State

NUMBERS = st.lists(st.floats(-3, 3, width=32), min_size=3, max_size=3).map(lambda values: torch.tensor(values, dtype=torch.float64))
SLOPES = torch.tensor([[1.0, -2.0], [0.5, 1.5], [-1.0, 0.3]], dtype=torch.float64)  # of three linear constraints in two unknowns


def state(lam: Tensor, rho: float) -> State:
    return AugmentedLagrangian().start(3) | {"lam": lam.abs(), "rho": torch.full((3,), rho, dtype=torch.float64)}


@given(x=NUMBERS, lam=NUMBERS, rho=st.floats(0, 5))
def test_the_gradient_is_the_weight_times_the_gradient_of_the_constraint(x: Tensor, lam: Tensor, rho: float) -> None:
    held, x = state(lam, rho), x[:2].clone().requires_grad_()
    g = SLOPES @ x - 0.1
    found = torch.autograd.grad(AugmentedLagrangian().value(g, held).sum(), x)[0]
    torch.testing.assert_close(found, AugmentedLagrangian().weight(g.detach(), held) @ SLOPES)


@given(g=NUMBERS, lam=NUMBERS)
def test_without_rho_it_is_the_plain_lagrangian(g: Tensor, lam: Tensor) -> None:
    plain = lam.abs() * g
    torch.testing.assert_close(AugmentedLagrangian().value(g, state(lam, 0.0)), plain)
    small = 1e-6  # towards it the difference goes like rho, where the multiplier is not on the edge of the active set
    inside = (lam.abs() + small * g > 0) & (lam.abs() > 1e-3)
    torch.testing.assert_close(AugmentedLagrangian().value(g, state(lam, small))[inside], plain[inside], atol=1e-4, rtol=0)


@given(x=NUMBERS, lam=NUMBERS, rho=st.floats(0.1, 5))
def test_the_hessian_gains_rho_times_the_outer_product_on_the_active_set(x: Tensor, lam: Tensor, rho: float) -> None:
    held, x = state(lam, rho), x[:2].clone()
    g = SLOPES @ x - 0.1
    active = (held["lam"] + rho * g > 0).double()
    hessian = torch.autograd.functional.hessian(lambda at: AugmentedLagrangian().value(SLOPES @ at - 0.1, held).sum(), x)
    torch.testing.assert_close(hessian, rho * (SLOPES * active[:, None]).T @ SLOPES)


# Two arms: a rewarding one of cost 1, a plain one of cost 0. Within a budget of 30 % the best mix takes the first 30 % of the time; there both arms
# are worth the same, 1 - lam = 0.2, so that the multiplier is 0.8.
REWARDS, COSTS, BUDGET, MULTIPLIER = torch.tensor([1.0, 0.2], dtype=torch.float64), torch.tensor([1.0, 0.0], dtype=torch.float64), 0.3, 0.8


def bandit(lagrangian: AugmentedLagrangian, steps: int, sampled: int = 0) -> tuple[Tensor, Tensor, State]:
    """Costs and rewards over time, and the last state, of a softmax policy that climbs `A_reward - weight A_cost`, exactly or from `sampled` pulls."""
    logits, held = torch.zeros(2, dtype=torch.float64), lagrangian.start(1)
    generator = torch.Generator().manual_seed(0)
    costs, rewards = [], []
    for _ in range(steps):
        mix = logits.softmax(0)
        pulls = torch.bincount(torch.multinomial(mix, sampled, True, generator=generator), minlength=2).double() / sampled if sampled else mix
        g = (pulls @ COSTS - BUDGET)[None]
        weight, held = lagrangian.answer(g, held)
        worth = REWARDS - weight * COSTS
        logits = logits + pulls * (worth - pulls @ worth)
        costs.append(mix @ COSTS)
        rewards.append(mix @ REWARDS)
    return torch.stack(costs), torch.stack(rewards), held


@pytest.mark.parametrize(("rho", "sampled"), [(0.1, 0), (1.0, 0), (0.1, 512), (1.0, 512)])
def test_alm_finds_the_multiplier_of_a_bandit(rho: float, sampled: int) -> None:
    costs, _, held = bandit(AugmentedLagrangian(rho=rho), 1000, sampled)
    assert held["lam"].item() == pytest.approx(MULTIPLIER, rel=0.1)
    assert costs[-300:].mean().item() == pytest.approx(BUDGET, abs=0.01)


@pytest.mark.parametrize("update", ["ascent", "adam_log", "pid"])
def test_every_update_ends_at_the_budget(update: str) -> None:
    lagrangian = AugmentedLagrangian(update=update, rho=1.0, rate=0.02)
    costs, _, held = bandit(lagrangian, 3000)
    assert costs[-300:].mean().item() == pytest.approx(BUDGET, abs=0.02)
    assert held["lam"].item() == pytest.approx(MULTIPLIER, rel=0.15)


@pytest.mark.parametrize(("update", "first"), [("pid", 2.0 * 0.3 + 0.5 * 0.3), ("ascent", 0.0), ("alm", 0.0)])
def test_a_controller_answers_in_the_iteration_that_it_sees(update: str, first: float) -> None:
    rho = 3.0 if update == "pid" else 0.0  # a controller has its own proportional part, and no other beside it
    lagrangian = AugmentedLagrangian(update=update, rho=rho, hold=1, pid=(2.0, 0.5, 1.0))
    weight, held = lagrangian.answer(torch.tensor([0.3], dtype=torch.float64), lagrangian.start(1))
    assert weight.item() == pytest.approx(first)
    if update == "pid":
        grown, _ = lagrangian.answer(torch.tensor([0.4], dtype=torch.float64), held)
        assert grown.item() == pytest.approx(2.0 * 0.4 + 0.5 * 0.7 + 1.0 * 0.1)


def test_a_budget_that_is_kept_anyway_costs_nothing() -> None:
    lagrangian = AugmentedLagrangian()
    held = lagrangian.start(1)
    for _ in range(50):
        held = lagrangian.updated(torch.tensor([-0.1]), held)
    assert held["lam"].item() == 0
    assert lagrangian.weight(torch.tensor([-0.1]), held).item() == 0


@pytest.mark.parametrize("rate", [1.0, 3000.0])
def test_a_multiplier_that_moves_by_shares_comes_back(rate: float) -> None:
    lagrangian = AugmentedLagrangian(update="adam_log", rate=rate)
    held = lagrangian.start(1)
    for _ in range(1000):
        held = lagrangian.updated(torch.tensor([-0.1]), held)
    assert held["lam"].item() == lagrangian.start(1)["lam"].item()
    for _ in range(100):
        held = lagrangian.updated(torch.tensor([0.3]), held)
    assert held["lam"].item() > 1


def test_a_constraint_that_cannot_be_met_does_not_grow_for_ever() -> None:
    lagrangian = AugmentedLagrangian(rho_most=10.0, most=50.0)
    held = lagrangian.start(1)
    for _ in range(500):
        held = lagrangian.updated(torch.tensor([1.0]), held)
    assert (held["rho"].item(), held["lam"].item()) == (10.0, 50.0)


@pytest.mark.parametrize("sampled", [0, 512])
def test_the_augmented_form_does_not_swing(sampled: int) -> None:
    """Over the last third, against dual ascent at the same rate of the multiplier without the quadratic term."""
    plain, plain_reward, _ = bandit(AugmentedLagrangian(update="ascent", rho=0.0, rate=0.2), 900, sampled)
    augmented, reward, _ = bandit(AugmentedLagrangian(update="ascent", rho=2.0, rate=0.2), 900, sampled)
    swing = (augmented[600:].std() / plain[600:].std()).item()
    price = (plain_reward[600:].mean() - reward[600:].mean()).item()
    print(f"{sampled or 'exact'}: swing of the cost {swing:.3f} of the plain form's, price in reward {price:+.4f}")
    assert swing <= 0.2
    assert price < 0.01
