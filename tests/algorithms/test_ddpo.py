"""DDPO against its formulas, and its baseline against the paper's published one (arXiv 2305.13301)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from safediffusion.algorithms.advantages import advantages
from safediffusion.algorithms.ddpo import Ddpo, running
from safediffusion.algorithms.grpo import Grpo
from safediffusion.algorithms.objective import Constraint, Objective
from safediffusion.algorithms.update import Learner
from safediffusion.config import resolve
from safediffusion.errors import UserError
from safediffusion.recipe import Recipe, check
from safediffusion.rollout import Rollout, roll_out
from safediffusion.types import Prompt

PROMPTS = (Prompt("a red cat"), Prompt("a knife", unsafe=True))
PLAIN = {"prompts": 2, "group": 4, "updates": 1, "min_count": 2, "clip": 2.5}
Make = Callable[..., Learner]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(4)


def painted(learner: Learner) -> Rollout:
    return roll_out(learner.policy, learner.process, learner.reward, PROMPTS, 4, learner.guidance, seeded(), True, learner.batch)


def close(one: Tensor, other: Tensor, tolerance: float = 1e-3) -> bool:
    return bool((one - other).norm() <= tolerance * other.norm())


# The baseline


class Published:
    """`PerPromptStatTracker` of the paper's code, in its own words."""

    def __init__(self, buffer_size: int, min_count: int) -> None:
        self.buffer_size, self.min_count, self.stats = buffer_size, min_count, {}

    def update(self, prompts: Any, rewards: Any) -> Any:
        advantages = np.empty_like(rewards)
        for prompt in np.unique(prompts):
            of_prompt = rewards[prompts == prompt]
            kept = self.stats.setdefault(prompt, deque(maxlen=self.buffer_size))
            kept.extend(of_prompt)
            compared = rewards if len(kept) < self.min_count else kept
            advantages[prompts == prompt] = (of_prompt - np.mean(compared)) / (np.std(compared) + 1e-6)
        return advantages


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.integers(2, 9), st.integers(2, 9), st.integers(2, 4))
def test_the_baseline_is_the_published_one(seed: int, remember: int, min_count: int, group: int) -> None:
    draw, published, memory = torch.Generator().manual_seed(seed), Published(remember, min_count), {}
    for _ in range(5):
        names = [f"prompt {i}" for i in torch.randint(4, (3,), generator=draw).tolist()]  # the same one may come twice
        total = torch.randn(3 * group, generator=draw)
        baseline = running(memory, [Prompt(name) for name in names], remember, min_count)
        ours = advantages(total, group, 1e-6, 1e9, 0.0, baseline=baseline).value
        theirs = published.update(np.repeat(names, group), total.double().numpy())
        if abs(theirs).max() < 1e3:  # else all of the scores compared are one
            torch.testing.assert_close(ours, torch.from_numpy(theirs).float(), atol=1e-3, rtol=1e-3)


def test_the_memory_is_whole_and_the_one_before_is_left_as_it_was() -> None:
    first, prompts = {}, (Prompt("a"), Prompt("b"))
    running(first, prompts, 3, 2)("total", torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    kept = {name: tensor.clone() for name, tensor in first.items()}
    after = dict(first)  # as the loop copies it, to repeat an iteration that ran out of memory
    running(after, (Prompt("b"), Prompt("c")), 3, 2)("total", torch.tensor([[5.0, 6.0], [7.0, 8.0]]))
    for name, tensor in kept.items():
        torch.testing.assert_close(first[name], tensor, equal_nan=True, rtol=0, atol=0)
    expected = torch.tensor([[1, 2, torch.nan], [4, 5, 6], [7, 8, torch.nan]])
    torch.testing.assert_close(after["baseline.total.scores"], expected, equal_nan=True)
    assert after["baseline.total.prompts"].dtype == torch.int64
    assert len(set(after["baseline.total.prompts"].tolist())) == 3


def test_parts_that_are_normalised_apart_have_baselines_of_their_own() -> None:
    memory: dict[str, Tensor] = {}
    baseline = running(memory, (Prompt("a"),), 4, 2)
    for name, score in (("red", 1.0), ("blue", 5.0)):
        assert baseline(name, torch.full((1, 2), score))[0].item() == score
    assert running(memory, (Prompt("a"),), 4, 2)("red", torch.full((1, 2), 2.0))[0].item() == 1.5


def test_a_prompt_that_earns_more_than_it_did_gains_as_a_whole(make_learner: Make) -> None:
    learner = make_learner()
    Ddpo(**PLAIN).step(learner, PROMPTS, seeded())
    last = learner.memory["baseline.total.scores"]
    lower = torch.where(last.isnan(), torch.nan, last - 1)
    learner.memory["baseline.total.scores"] = lower
    rolled = painted(learner)
    gain, _ = learner.worth(rolled, 0.02, 2.5, 0.0, 0.0, running(learner.memory, PROMPTS, 16, 2))
    assert (gain.value > 0).all()


def test_dead_is_what_its_baseline_expected() -> None:
    memory: dict[str, Tensor] = {}
    baseline = running(memory, (Prompt("a"), Prompt("b")), 4, 2)
    assert advantages(torch.ones(4), 2, 0.1, 2.5, 1e-3, baseline=baseline).alive.tolist() == [False, False]
    baseline = running(memory, (Prompt("a"), Prompt("b")), 4, 2)
    gain = advantages(torch.tensor([1.0, 1.0, 2.0, 2.0]), 2, 0.1, 2.5, 1e-3, baseline=baseline)
    assert gain.alive.tolist() == [False, True]  # the second without spread of its own, but better than ever
    assert gain.value[:2].tolist() == [0, 0] and (gain.value[2:] > 0).all()


# The gradient


@pytest.mark.parametrize("estimator", ["importance", "score"])
def test_the_first_step_is_that_of_grpo(make_learner: Make, gradient: Callable, estimator: str) -> None:
    """With nothing remembered, a prompt's own pictures are its baseline; and at ratio 1 both estimators have one gradient."""
    ours, theirs = make_learner(guidance=3.0, moved=0.01), make_learner(guidance=3.0, moved=0.01)
    metrics = Ddpo(**PLAIN, estimator=estimator).step(ours, PROMPTS, seeded())
    expected = Grpo(prompts=2, group=4).step(theirs, PROMPTS, seeded())
    assert close(gradient(ours), gradient(theirs), 1e-5) and gradient(ours).norm() > 0
    assert metrics["kl"] == pytest.approx(expected["kl"]) and metrics["kl"] > 0
    assert metrics["ratio/distance"] == 0 == metrics["ratio/clipped"]
    assert ours.forwards == theirs.forwards == 8 * 4 * 2 + 8 * 2 * (3 + 1)


@pytest.mark.parametrize("estimator", ["importance", "score"])
def test_the_gradient_is_that_of_the_weighted_log_probability(make_learner: Make, gradient: Callable, estimator: str) -> None:
    learner = make_learner()
    learner.memory.update(_remembered())
    options = PLAIN | {"benign_kl": 0.0, "unsafe_kl": 0.0, "drop_last": 0, "normalise_ratio": False, "least_spread": 0.0}
    Ddpo(**options, estimator=estimator).step(learner, PROMPTS, seeded())
    got, rollout = gradient(learner), painted(learner)
    scores = rollout.scores.total.view(2, 4)
    with_past = torch.cat([torch.tensor([[0.1, -0.2], [0.3, 0.0]]), scores], 1)
    gain = ((scores - with_past.mean(1, keepdim=True)) / (with_past.std(1, correction=0, keepdim=True) + 0.02)).clamp(-2.5, 2.5).flatten()
    learner.optimizer.zero_grad()
    for step in range(3):
        x, x_next = rollout.walk.states[step], rollout.walk.states[step + 1]
        output = learner.policy.predict(x, torch.full((8,), int(learner.process.times[step])), rollout.condition)
        kernel = learner.process.kernel(output, x, step)
        log_prob = torch.distributions.Normal(kernel.mean, kernel.std).log_prob(x_next).sum((1, 2, 3))
        (-(gain * log_prob).sum() / 256 / (8 * 3)).backward()
    assert close(got, gradient(learner))


def _remembered() -> dict[str, Tensor]:
    memory: dict[str, Tensor] = {}
    running(memory, PROMPTS, 16, 2)("total", torch.tensor([[0.1, -0.2], [0.3, 0.0]]))
    return memory


def test_later_updates_are_clipped(make_learner: Make) -> None:
    metrics = Ddpo(**(PLAIN | {"updates": 2, "clip_range": 1e-6})).step(make_learner(lr=1.0), PROMPTS, seeded())
    assert metrics["ratio/distance"] > 1e-5
    assert 0 < metrics["ratio/clipped"] <= 0.5


def test_micro_batches_do_not_change_the_step(make_learner: Make, gradient: Callable) -> None:
    whole, parts = make_learner(moved=0.01), make_learner(moved=0.01, batch=3)
    metrics = [Ddpo(**PLAIN).step(learner, PROMPTS, seeded()) for learner in (whole, parts)]
    assert close(gradient(parts), gradient(whole))
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-3, abs=1e-6)
    assert whole.forwards == parts.forwards


def test_dead_groups_are_left_out(make_learner: Make, weights: Callable) -> None:
    learner = make_learner(lr=1.0, moved=0.01)
    before = weights(learner)
    metrics = Ddpo(**PLAIN).step(learner, (Prompt("nothing"),) * 2, seeded())
    assert metrics["dead_groups"] == 1.0
    assert metrics["grad_norm"] == metrics["kl"] == metrics["loss"] == 0.0
    assert torch.equal(weights(learner), before)
    living = make_learner()
    assert Ddpo(**PLAIN).step(living, (Prompt("nothing"), PROMPTS[1]), seeded())["dead_groups"] == 0.5
    assert living.forwards == 8 * 4 + 4 * 2 * (3 + 1)


def test_constraints_enter(make_learner: Make, gradient: Callable) -> None:
    """A cost that is over its budget adds its own advantage, centred in the group, to that of the baseline."""
    free, bound = make_learner(), make_learner()
    bound.objective = Objective(constraints=(Constraint(cost="blue", budget=-1.0, prompts="all"),))
    Ddpo(**PLAIN).step(free, PROMPTS, seeded())
    metrics = Ddpo(**PLAIN).step(bound, PROMPTS, seeded())
    assert metrics["constraint/blue/weight"] > 0
    assert not close(gradient(bound), gradient(free))
    assert "baseline.total.scores" in bound.memory and "constraints.lam" in bound.memory


@pytest.mark.parametrize(
    ("options", "process", "message"),
    [
        ({}, {"eta": 0.0}, "needs log-probabilities"),
        ({"estimator": "score", "updates": 3}, {}, "not after 2 updates; set algorithm.updates = 1"),
        ({"min_count": 20}, {}, "never reached by the 16 scores"),
        ({"drop_last": 3}, {"steps": 4}, "leaves none of the 3 stochastic steps"),
        ({"updates": 17}, {}, "more than the 16 groups"),
    ],
)
def test_what_cannot_work_is_refused(options: dict, process: dict, message: str) -> None:
    reward = {"kind": "callable", "function": "nobody:calls"}
    recipe = {"model": "pictograms", "steps": 1, "reward": reward, "algorithm": {"kind": "ddpo"} | options, "process": {"eta": 1.0} | process}
    with pytest.raises(UserError, match=message):
        check(resolve(Recipe, recipe))


def test_scores_of_other_multipliers_are_no_baseline() -> None:
    reward = {"kind": "callable", "function": "nobody:calls"}
    recipe = {"model": "pictograms", "steps": 1, "reward": reward, "algorithm": {"kind": "ddpo"}, "process": {"eta": 1.0}, "lagrangian": {"normalise": "together"}}
    recipe |= {"constraints": [{"cost": "cost", "budget": 0.1, "prompts": "all"}], "data": {"unsafe": "pictograms/train-unsafe"}}
    with pytest.raises(UserError, match='normalise = "together" takes weight \\* cost off the scores, and the running baseline'):
        check(resolve(Recipe, recipe))
    check(resolve(Recipe, recipe | {"algorithm": {"kind": "grpo"}}))


def test_groups_are_shared_out_to_as_many_updates_as_are_asked_for(make_learner: Make) -> None:
    learner = make_learner()
    prompts = tuple(Prompt(f"a red {word}") for word in ("cat", "cup", "bus", "hat"))
    Ddpo(**(PLAIN | {"prompts": 4, "updates": 3, "least_spread": 0.0})).step(learner, prompts, seeded())
    assert learner.updates == 3
