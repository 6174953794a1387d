"""Direct back-propagation against a walk differentiated by hand; what it leaves alone, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from safediffusion.algorithms.draft import Draft
from safediffusion.algorithms.lagrangian import AugmentedLagrangian
from safediffusion.algorithms.objective import Constraint, Objective
from safediffusion.algorithms.refl import Refl
from safediffusion.algorithms.update import Learner
from safediffusion.config import resolve
from safediffusion.errors import UserError
from safediffusion.recipe import Recipe, check
from safediffusion.types import Prompt, Scores

PROMPTS = (Prompt("a red cat"), Prompt("a knife", unsafe=True))
PLAIN = {"prompts": 2, "group": 2, "benign_kl": 0.0, "unsafe_kl": 0.0}
RECIPE = {"model": "pictograms", "steps": 1, "process": {"steps": 4}, "reward": {"kind": "similarity", "encoder": "pictograms"}}
Make = Callable[..., Learner]
Gradient = Callable[[Learner], Tensor]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(4)


def close(one: Tensor, other: Tensor, tolerance: float = 1e-3) -> bool:
    return bool((one - other).norm() <= tolerance * other.norm()) and bool(other.norm() > 0)


def walked(learner: Learner, last: int, foreseen: int | None = None) -> tuple[Tensor, torch.Generator]:
    """The clean latents of the step's own rollout, by hand: a graph over the last steps; with `foreseen`, x0^ of that step instead, its graph alone."""
    generator, policy, process = seeded(), learner.policy, learner.process
    x = torch.randn((4, *policy.sample_shape), generator=generator)
    noises = dict(zip(process.stochastic_steps, [torch.randn(x.shape, generator=generator) for _ in process.stochastic_steps], strict=True))
    condition = policy.encode([prompt.text for prompt in PROMPTS for _ in range(2)])
    for step, time in enumerate(process.times.tolist()):
        with torch.set_grad_enabled(step == foreseen or (foreseen is None and step >= len(process.times) - last)):
            output = policy.predict(x, torch.full((4,), time), condition, learner.guidance)
            constants = process.steps[step]
            x0, epsilon = process.split(output, x, step)
            if step == foreseen:
                return x0, generator
            x = constants.signal * x0 + constants.direction * epsilon + (constants.std * noises[step] if step in noises else 0)
    return x, generator


def reward(learner: Learner, clean: Tensor) -> Tensor:
    return learner.reward(learner.policy.decode(clean), [prompt for prompt in PROMPTS for _ in range(2)]).total.mean()


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("last", [1, 3])
def test_draft_is_the_gradient_of_the_reward_through_the_last_steps(make_learner: Make, gradient: Gradient, last: int, eta: float) -> None:
    learner = make_learner(steps=3, eta=eta, guidance=2.0 if last == 1 else 1.0)
    metrics = Draft(last=last, **PLAIN).step(learner, PROMPTS, seeded())
    found = gradient(learner)
    learner.optimizer.zero_grad()
    value = reward(learner, walked(learner, last)[0])
    (-value).backward()
    assert close(found, gradient(learner))
    assert metrics["loss"] == pytest.approx(-value.item(), abs=1e-5) and metrics["kl"] == 0
    assert metrics["reward/total"] == pytest.approx(value.item(), abs=1e-5)


def test_copies_are_the_last_step_from_the_finished_picture_made_noisy(make_learner: Make, gradient: Gradient) -> None:
    learner = make_learner(steps=3, eta=0.0)
    Draft(last=1, copies=2, **PLAIN).step(learner, PROMPTS, seeded())
    found = gradient(learner)
    learner.optimizer.zero_grad()
    clean, generator = walked(learner, 1)
    total, (a, s) = reward(learner, clean), (float(learner.process.schedule.alphas_cumprod[learner.process.times[-1]]) ** 0.5 for _ in range(2))
    s = (1 - a**2) ** 0.5
    condition = learner.policy.encode([prompt.text for prompt in PROMPTS for _ in range(2)])
    for _ in range(2):
        x = a * clean.detach() + s * torch.randn(clean.shape, generator=generator)
        output = learner.policy.predict(x, learner.process.times[-1], condition)
        total = total + reward(learner, learner.process.advance(output, x, 2, None)[0])
    (-total / 3).backward()
    assert close(found, gradient(learner))


def test_refl_is_the_gradient_through_what_one_step_foresees(make_learner: Make, gradient: Gradient) -> None:
    learner = make_learner(steps=4, eta=1.0)
    Refl(late=0.25, **PLAIN).step(learner, PROMPTS, seeded())
    last = gradient(learner)
    Refl(late=1.0, **PLAIN).step(learner, PROMPTS, seeded())
    drawn, (_, generator) = gradient(learner), walked(learner, 0)
    for found, step in ((last, 3), (drawn, 3 - int(torch.randint(4, (), generator=generator)))):
        learner.optimizer.zero_grad()
        (-reward(learner, walked(learner, 0, step)[0])).backward()
        assert close(found, gradient(learner))


def test_a_random_truncation_draws_from_one_to_last(make_learner: Make, gradient: Gradient) -> None:
    learner = make_learner(steps=3, eta=0.0)
    Draft(last=3, truncate="random", **PLAIN).step(learner, PROMPTS, seeded())
    found, (_, generator) = gradient(learner), walked(learner, 0)
    Draft(last=int(torch.randint(1, 4, (), generator=generator)), **PLAIN).step(learner, PROMPTS, seeded())
    assert close(gradient(learner), found)


@pytest.mark.parametrize("algorithm", [Draft(last=2, group=2, times=2), Draft(last=1, group=2, copies=1), Refl(group=2)], ids=["draft", "copies", "refl"])
def test_micro_batches_and_recomputing_change_nothing(make_learner: Make, gradient: Gradient, algorithm: Any) -> None:
    learners = [make_learner(steps=3, batch=batch, moved=0.02, guidance=1.5) for batch in (0, 3, 0)]
    lines = [type(algorithm)(**{**options(algorithm), "recompute": i == 2}).step(learner, PROMPTS, seeded()) for i, learner in enumerate(learners)]
    for learner, line in zip(learners[1:], lines[1:], strict=True):
        assert close(gradient(learner), gradient(learners[0]))
        assert line["kl"] == pytest.approx(lines[0]["kl"], rel=1e-4) and line["kl"] > 0
        assert learner.forwards == learners[0].forwards


def options(algorithm: Any) -> dict[str, Any]:
    return {name: getattr(algorithm, name) for name in algorithm.__pydantic_fields__}


def test_the_pull_holds_to_the_base(make_learner: Make, gradient: Gradient) -> None:
    """At the base it has no gradient; away from it, it adds its own for the class of prompt that it is set for."""
    at_base = make_learner(steps=3)
    Draft(**PLAIN | {"benign_kl": 5.0}).step(at_base, PROMPTS, seeded())
    without = gradient(at_base)
    Draft(**PLAIN).step(at_base, PROMPTS, seeded())
    assert close(gradient(at_base), without)
    away = make_learner(steps=3, moved=0.05)
    found = []
    for benign, unsafe in ((0.0, 0.0), (2.0, 0.0), (0.0, 2.0), (2.0, 2.0)):
        Draft(**PLAIN | {"benign_kl": benign, "unsafe_kl": unsafe}).step(away, PROMPTS, seeded())
        found.append(gradient(away))
    assert close(found[3] - found[0], (found[1] - found[0]) + (found[2] - found[0]), 0.02)


def test_a_constraint_is_in_the_loss_of_the_very_step_that_sees_it_broken(make_learner: Make, gradient: Gradient) -> None:
    plain, constrained = make_learner(steps=2), make_learner(steps=2)
    constrained.objective = Objective(constraints=(Constraint(cost="blue", budget=0.0, prompts="all", smooth=0.0),), lagrangian=AugmentedLagrangian(rho=3.0))
    Draft(last=2, **PLAIN).step(plain, PROMPTS, seeded())
    metrics = Draft(last=2, **PLAIN).step(constrained, PROMPTS, seeded())
    weight = metrics["constraint/blue/weight"]
    assert weight == pytest.approx(3.0 * metrics["reward/blue"], rel=1e-5)
    found, alone = gradient(constrained), gradient(plain)
    plain.optimizer.zero_grad()
    plain.reward(plain.policy.decode(walked(plain, 2)[0]), [prompt for prompt in PROMPTS for _ in range(2)]).parts["blue"].mean().backward()
    assert close(found - alone, weight * gradient(plain), 0.02)


def test_scores_that_come_without_their_gradient_are_refused(make_learner: Make) -> None:
    learner = make_learner()
    own = learner.reward
    learner.reward = lambda images, prompts: Scores(own(images, prompts).total.detach(), {})
    with pytest.raises(UserError, match=r"the reward's total has no gradient to the pictures, though it was said to have one"):
        Draft(**PLAIN).step(learner, PROMPTS, seeded())
    learner.reward = lambda images, prompts: Scores((scores := own(images, prompts)).total, {"blue": scores.parts["blue"].detach()})
    learner.objective = Objective(constraints=(Constraint(cost="blue", budget=0.0),))
    with pytest.raises(UserError, match=r"the reward's blue has no gradient"):
        Refl(**PLAIN).step(learner, PROMPTS, seeded())


def test_one_picture_a_prompt_is_enough() -> None:
    for kind in ("draft", "refl"):
        check(resolve(Recipe, RECIPE | {"algorithm": {"kind": kind, "group": 1}}))


@pytest.mark.parametrize("kind", ["draft", "refl"])
@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"reward": {"kind": "jpeg"}}, "follows the gradient of the reward, and this one of kind 'jpeg' has none"),
        ({"reward": {"kind": "callable", "function": "a:b"}}, "of kind 'callable' has none"),
        ({"reward": {"kind": "detection"}, "constraints": [{"cost": "unsafe_rate", "budget": 0.1}]}, r"constraints\.0\.cost = 'unsafe_rate' has no gradient.*unsafe$"),
        ({"reward": {"kind": "combined", "normalise": "each", "parts": [{"name": "a", "reward": {"kind": "detection"}}]}}, 'normalise = "each"'),
        ({"process": {"steps": 4, "solver": "dpm++2m"}}, r"process\.solver = 'ddim'"),
    ],
)
def test_what_has_no_gradient_is_refused(kind: str, tables: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(resolve(Recipe, RECIPE | {"algorithm": {"kind": kind}} | tables))


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [({"last": 5}, "more than the 4 steps"), ({"last": 2, "copies": 1}, "set algorithm.last = 1"), ({"time_range": [0.5, 0.5]}, "is empty")],
)
def test_settings_of_draft_that_cannot_work(algorithm: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(resolve(Recipe, RECIPE | {"algorithm": {"kind": "draft", **algorithm}}))
