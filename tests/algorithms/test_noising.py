"""What the methods on clean pictures share: who is painted, at which noise levels they are trained, and what all of them keep."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from safediffusion.algorithms.dpo import Dpo
from safediffusion.algorithms.kto import Kto
from safediffusion.algorithms.noising import judged
from safediffusion.algorithms.objective import Constraint, Objective
from safediffusion.algorithms.raft import Raft
from safediffusion.algorithms.rwr import Rwr
from safediffusion.algorithms.update import Learner
from safediffusion.errors import UserError
from safediffusion.types import Prompt

PROMPTS = (Prompt("a red cat"), Prompt("a knife", unsafe=True))
PLAIN: dict[str, Any] = {"prompts": 2, "group": 4, "times": 2}
METHODS = {"rwr": (Rwr, {}), "raft": (Raft, {}), "dpo": (Dpo, {}), "dpo-all": (Dpo, {"pairs": "all"}), "kto": (Kto, {})}
# Pictures of two groups of four that are trained on, and forwards of each and noise level: base, policy, backward as two; kto looks before.
COSTS = {"rwr": (8, 4), "raft": (2, 4), "dpo": (4, 4), "dpo-all": (8, 4), "kto": (8, 5)}
Make = Callable[..., Learner]


def method(name: str, **options: Any) -> Any:
    kind, own = METHODS[name]
    return kind(**(PLAIN | own | options))


def close(one: torch.Tensor, other: torch.Tensor, tolerance: float = 1e-3) -> bool:
    return bool((one - other).norm() <= tolerance * other.norm())


@pytest.mark.parametrize("name", METHODS)
def test_micro_batches_do_not_change_the_step(make_learner: Make, gradient: Callable, witnessed: Callable, name: str) -> None:
    whole, parts = make_learner(moved=0.01, guidance=2.0), make_learner(moved=0.01, guidance=2.0, batch=3)
    metrics = [witnessed(learner, method(name, least_spread=0.0), PROMPTS)[0] for learner in (whole, parts)]
    assert close(gradient(parts), gradient(whole))
    assert gradient(whole).norm() > 0
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-3, abs=1e-6)
    pictures, each = COSTS[name]
    assert whole.forwards == parts.forwards == 8 * 4 * 2 + 2 * pictures * each


@pytest.mark.parametrize("name", METHODS)
def test_dead_groups_are_left_out(make_learner: Make, weights: Callable, witnessed: Callable, name: str) -> None:
    learner = make_learner(eta=0.0, lr=1.0, moved=0.01)
    before = weights(learner)
    metrics, seen = witnessed(learner, method(name, benign_kl=1.0), (Prompt("nothing"), PROMPTS[1]))
    assert metrics["dead_groups"] == 0.5
    assert [len(clean) for clean, _, _ in seen] == [COSTS[name][0] // 2] * 2
    assert metrics["grad_norm"] > 0
    assert not torch.equal(weights(learner), before)
    before = weights(learner)
    metrics, seen = witnessed(learner, method(name, benign_kl=1.0), (Prompt("nothing"),) * 2)
    assert metrics["dead_groups"] == 1.0
    assert metrics["grad_norm"] == metrics["kl"] == metrics["loss"] == 0.0
    assert seen == []
    assert torch.equal(weights(learner), before)


@pytest.mark.parametrize("name", METHODS)
def test_the_kl_is_zero_at_the_start_and_then_pulls_back(make_learner: Make, witnessed: Callable, name: str) -> None:
    strong = method(name, benign_kl=1e4, unsafe_kl=1e4)
    assert witnessed(make_learner(train="lora", eta=0.0), strong, PROMPTS)[0]["kl"] == 0.0
    away = make_learner(eta=0.0, lr=1e-3, moved=0.02)
    away.max_grad_norm = 1.0
    distances = [witnessed(away, strong, PROMPTS)[0]["kl"] for _ in range(2)]
    assert distances[0] > distances[1] > 0


@pytest.mark.parametrize("name", METHODS)
def test_a_step_makes_what_is_worth_more_easier_to_denoise(make_learner: Make, witnessed: Callable, look: Callable, name: str) -> None:
    """The error of a group's best picture falls, and against that of the worst where a method pushes that away, at the noise they were trained at."""
    learner, algorithm = make_learner(eta=0.0, lr=1e-2), method(name, times=4, benign_kl=0.0, unsafe_kl=0.0)
    learner.max_grad_norm = 1.0
    rolled, worth, _ = judged(algorithm, learner, PROMPTS, torch.Generator().manual_seed(4))
    order = worth.view(-1, 4).argsort(dim=1, descending=True) + 4 * torch.arange(2)[:, None]
    _, seen = witnessed(learner, algorithm, PROMPTS)
    change, pushed = 0.0, name not in ("rwr", "raft")
    for _, noise, time in seen:
        level = noise[:: len(noise) // 2], time[:: len(time) // 2]
        for place, sign in ((0, 1), (-1, -1))[: 1 + pushed]:
            chosen = rolled[order[:, place]]
            with torch.no_grad():
                there = look(learner, chosen.condition, (chosen.walk.clean, *level))
            change += sign * float((there.error - there.base).sum())
    assert change < 0


@pytest.mark.parametrize("name", METHODS)
def test_a_constraint_on_the_kl_adds_to_the_pull(make_learner: Make, witnessed: Callable, name: str) -> None:
    learner = make_learner(eta=0.0, moved=0.02)
    learner.objective = Objective(constraints=(Constraint(cost="kl", budget=0.0),))
    metrics, _ = witnessed(learner, method(name), PROMPTS)
    assert metrics["kl"] > 0
    assert metrics["constraint/kl/cost"] == pytest.approx(metrics["kl"])
    assert learner.objective.pull(learner.memory) > 0


def test_worth_is_that_of_the_objective(make_learner: Make) -> None:
    learner = make_learner(eta=0.0)
    learner.objective = Objective(constraints=(Constraint(cost="blue", budget=-1.0, prompts="all"),))
    rolled, worth, metrics = judged(Rwr(**PLAIN), learner, PROMPTS, torch.Generator().manual_seed(4))
    learner.memory = {}
    gain, _ = learner.worth(rolled, Rwr().floor, Rwr().clip, Rwr().least_spread)
    assert torch.equal(worth, gain.value)
    assert metrics["constraint/blue/weight"] > 0


def test_the_members_of_a_group_share_time_and_noise(make_learner: Make, witnessed: Callable) -> None:
    for name, group in (("rwr", 4), ("raft", 1), ("dpo", 2), ("dpo-all", 4), ("kto", 4)):
        _, seen = witnessed(make_learner(eta=0.0), method(name, least_spread=0.0), PROMPTS)
        for _, noise, time in seen:
            by_group = noise.unflatten(0, (2, group))
            assert (by_group == by_group[:, :1]).all()
            assert (by_group[0] != by_group[1]).any()
            assert (time.view(2, group) == time.view(2, group)[:, :1]).all()


@pytest.mark.parametrize("name", METHODS)
def test_what_cannot_be_drawn_is_refused(name: str) -> None:
    recipe = SimpleNamespace(constraints=())
    with pytest.raises(ValidationError, match=r"\[0.9, 0.1\] is empty; give the lower share first"):
        method(name, time_range=(0.9, 0.1))
    with pytest.raises(UserError, match="more than the 2 times"):
        method(name, updates=3).check(recipe)
    method(name).check(recipe)


@pytest.mark.parametrize(("times", "updates"), [(4, 3), (4, 4), (5, 2)])
def test_there_are_as_many_updates_as_are_asked_for(make_learner: Make, times: int, updates: int) -> None:
    learner = make_learner(eta=0.0)
    method("rwr", least_spread=0.0, times=times, updates=updates).step(learner, PROMPTS, torch.Generator().manual_seed(4))
    assert learner.updates == updates
