"""D3PO against its formula (arXiv 2311.13231), computed apart from it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from safediffusion.algorithms.d3po import D3po, preferred
from safediffusion.algorithms.objective import Constraint, Objective
from safediffusion.algorithms.update import Learner
from safediffusion.config import resolve
from safediffusion.errors import UserError
from safediffusion.recipe import Recipe, check
from safediffusion.rollout import Rollout, roll_out
from safediffusion.types import Prompt

PROMPTS = (Prompt("a red cat"), Prompt("a knife", unsafe=True))
PLAIN = {"prompts": 2, "group": 4, "updates": 1, "benign_kl": 0.0, "unsafe_kl": 0.0, "drop_last": 0, "normalise_ratio": False, "least_spread": 0.0}
Make = Callable[..., Learner]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(4)


def painted(learner: Learner) -> Rollout:
    return roll_out(learner.policy, learner.process, learner.reward, PROMPTS, 4, learner.guidance, seeded(), True, learner.batch)


def close(one: Tensor, other: Tensor, tolerance: float = 1e-3) -> bool:
    return bool((one - other).norm() <= tolerance * other.norm())


def paired(learner: Learner, rollout: Rollout, pairs: list[list[tuple[int, int]]], beta: float) -> float:
    """Leaves the gradient of the paper's loss over `beta`, a mean over the pairs of each group, groups and steps; gives the mean loss."""
    learner.optimizer.zero_grad()
    total = 0.0
    for step in range(3):
        x, x_next, time = rollout.walk.states[step], rollout.walk.states[step + 1], torch.full((8,), int(learner.process.times[step]))

        def log_prob(x: Tensor = x, x_next: Tensor = x_next, time: Tensor = time, step: int = step) -> Tensor:
            kernel = learner.process.kernel(learner.policy.predict(x, time, rollout.condition), x, step)
            return torch.distributions.Normal(kernel.mean, kernel.std).log_prob(x_next).sum((1, 2, 3)) / 256

        with learner.policy.reference():
            base = log_prob()
        ratio = log_prob() - base
        each = [torch.stack([(1 + (-beta * (ratio[better] - ratio[worse])).exp()).log() for better, worse in group]).mean() for group in pairs if group]
        loss = sum(each) / len(pairs) / 3
        (loss / beta).backward()
        total += float(loss.detach())
    return total


@pytest.mark.parametrize("pairs", ["extremes", "all"])
def test_the_gradient_is_that_of_the_papers_loss(make_learner: Make, gradient: Callable, pairs: str) -> None:
    learner, beta = make_learner(moved=0.02), 2.0
    metrics = D3po(**PLAIN, pairs=pairs, beta=beta).step(learner, PROMPTS, seeded())
    got, rollout = gradient(learner), painted(learner)
    score = rollout.scores.total.tolist()
    members = [range(4), range(4, 8)]
    if pairs == "extremes":
        chosen = [[(max(group, key=score.__getitem__), min(group, key=score.__getitem__))] for group in members]
    else:
        chosen = [[(one, other) for one in group for other in group if score[one] > score[other]] for group in members]
        assert [len(group) for group in chosen] == [6, 6]
    loss = paired(learner, rollout, chosen, beta)
    assert abs(loss - math.log(2)) > 0.01  # far enough from the base for beta to matter
    assert metrics["loss"] == pytest.approx(loss, rel=1e-3)
    assert close(got, gradient(learner), 3e-3) and got.norm() > 0


@pytest.mark.parametrize("pairs", ["extremes", "all"])
def test_at_the_base_no_pair_is_told_apart_and_beta_does_not_matter(make_learner: Make, gradient: Callable, pairs: str) -> None:
    seen = []
    for beta in (1.0, 500.0):
        learner = make_learner(guidance=2.0)
        metrics = D3po(**(PLAIN | {"benign_kl": 0.5, "unsafe_kl": 0.5}), pairs=pairs, beta=beta).step(learner, PROMPTS, seeded())
        assert metrics["loss"] == pytest.approx(math.log(2), rel=1e-5)
        assert metrics["kl"] == 0.0
        seen.append(gradient(learner))
    assert close(seen[0], seen[1]) and seen[0].norm() > 0


def test_an_update_tells_the_pairs_apart(make_learner: Make) -> None:
    learner = make_learner(lr=1e-2)
    learner.max_grad_norm = 1.0
    algorithm = D3po(**PLAIN)
    algorithm.step(learner, PROMPTS, seeded())
    learner.optimizer = torch.optim.SGD(learner.parameters, lr=0.0)
    # The same trajectories again, painted by the base, are scored by the policy as it has become.
    with learner.policy.reference():
        rollout = painted(learner)
    groups = torch.arange(8).view(2, 4)
    gain = rollout.scores.total
    losses = algorithm._losses(learner, learner.process.stochastic_steps, 4)
    totals = torch.zeros(4)
    list(losses(rollout[groups.flatten()], gain, totals))
    assert totals[2] / totals[3] > 0.5
    assert totals[0] / totals[3] < math.log(2)


def test_equal_pictures_make_no_pair() -> None:
    above = torch.tensor([[0.1, 0.3, -0.2], [0.0, 0.0, 5.0]], requires_grad=True)
    loss, accuracy = preferred(above, torch.tensor([[1.0, 1.0, 0.0], [2.0, 2.0, 2.0]]), 2.0)
    expected = (math.log1p(math.exp(-0.6)) + math.log1p(math.exp(-1.0))) / 2
    torch.testing.assert_close(loss, torch.tensor([expected, 0.0]))
    assert accuracy.tolist() == [1.0, 0.0]
    loss.sum().backward()
    assert (above.grad[0] != 0).all() and (above.grad[1] == 0).all()


@pytest.mark.parametrize("pairs", ["extremes", "all"])
def test_micro_batches_do_not_change_the_step_nor_part_a_pair(make_learner: Make, gradient: Callable, pairs: str) -> None:
    options: dict[str, Any] = PLAIN | {"benign_kl": 0.5, "unsafe_kl": 0.1, "pairs": pairs}
    whole, parts = make_learner(moved=0.01), make_learner(moved=0.01, batch=1)
    metrics = [D3po(**options).step(learner, PROMPTS, seeded()) for learner in (whole, parts)]
    assert close(gradient(parts), gradient(whole))
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-3, abs=1e-6)
    assert whole.forwards == parts.forwards == 8 * 4 + (4 if pairs == "extremes" else 8) * 3 * (3 + 1)


def test_the_pull_to_the_base_goes_by_class(make_learner: Make, gradient: Callable) -> None:
    plain, pulled = make_learner(moved=0.01), make_learner(moved=0.01)
    D3po(**PLAIN, pairs="all").step(plain, PROMPTS, seeded())
    D3po(**(PLAIN | {"benign_kl": 7.0, "unsafe_kl": 2.0}), pairs="all").step(pulled, PROMPTS, seeded())
    got = gradient(pulled) - gradient(plain)
    rollout = painted(plain)
    plain.optimizer.zero_grad()
    for step in range(3):
        x, time = rollout.walk.states[step], torch.full((8,), int(plain.process.times[step]))
        mean = plain.process.kernel(plain.policy.predict(x, time, rollout.condition), x, step).mean
        with plain.policy.reference():
            base = plain.process.kernel(plain.policy.predict(x, time, rollout.condition), x, step)
        kl = (mean - base.mean).square().sum((1, 2, 3)) / (2 * base.std**2) / 256
        ((torch.tensor([7.0] * 4 + [2.0] * 4) * kl).sum() / 24).backward()
    assert close(got, gradient(plain))


def test_dead_groups_are_left_out(make_learner: Make, weights: Callable) -> None:
    learner = make_learner(lr=1.0, moved=0.01)
    before = weights(learner)
    metrics = D3po(prompts=2, group=2).step(learner, (Prompt("nothing"),) * 2, seeded())
    assert metrics["dead_groups"] == 1.0
    assert metrics["grad_norm"] == metrics["kl"] == metrics["loss"] == 0.0
    assert torch.equal(weights(learner), before)
    half = make_learner()
    assert D3po(**(PLAIN | {"least_spread": 1e-4}), pairs="extremes").step(half, (Prompt("nothing"), PROMPTS[1]), seeded())["dead_groups"] == 0.5
    assert half.forwards == 8 * 4 + 2 * 3 * (3 + 1)


def test_a_constraint_turns_pairs_round(make_learner: Make, gradient: Callable) -> None:
    """Where a cost weighs more than the reward, the better picture is the one of less cost."""
    reverse, bound = make_learner(), make_learner()
    inner = reverse.reward

    def opposite(images: Tensor, prompts: object):
        scores = inner(images, prompts)
        return type(scores)(-scores.parts["red"], scores.parts, scores.embedding)

    reverse.reward = opposite
    bound.objective = Objective(constraints=(Constraint(cost="red", budget=-1e6, prompts="all"),))
    for learner in (reverse, bound):
        D3po(**PLAIN, pairs="all").step(learner, PROMPTS, seeded())
    assert close(gradient(bound), gradient(reverse))


@pytest.mark.parametrize(
    ("options", "process", "message"),
    [({}, {"eta": 0.0}, "needs log-probabilities"), ({"drop_last": 9}, {}, "leaves none"), ({"updates": 17}, {}, "more than the 16 groups")],
)
def test_what_cannot_work_is_refused(options: dict, process: dict, message: str) -> None:
    reward = {"kind": "callable", "function": "nobody:calls"}
    recipe = {"model": "pictograms", "steps": 1, "reward": reward, "algorithm": {"kind": "d3po"} | options, "process": {"eta": 1.0} | process}
    with pytest.raises(UserError, match=message):
        check(resolve(Recipe, recipe))
