"""Recipes with several rewards and constraints: what is refused, and what the learner is then told to want."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator

from safediffusion import build
from safediffusion.algorithms.objective import Constraint, Weight
from safediffusion.config import dump, read_toml, resolve
from safediffusion.errors import UserError
from safediffusion.recipe import Recipe, check

ALIGN = {"name": "align", "reward": {"kind": "similarity", "encoder": "pictograms"}}
GUARD = {"name": "guard", "weight": 0.0, "reward": {"kind": "detection"}}
SIZE = {"name": "size", "weight": 0.5, "prompts": "safe", "reward": {"kind": "jpeg"}}
BUDGET = {"cost": "guard.unsafe_rate", "budget": 0.1}
RECIPE = {
    "model": "pictograms",
    "steps": 1,
    "process": {"steps": 2},
    "algorithm": {"kind": "forward", "prompts": 2, "group": 2, "times": 1},
    "probe": {"every": 0},
    "reward": {"kind": "combined", "parts": [ALIGN, GUARD, SIZE]},
    "constraints": [BUDGET],
}


def recipe(**tables: object) -> Recipe:
    return resolve(Recipe, RECIPE | tables)


def test_it_survives_its_own_dump(tmp_path) -> None:
    (tmp_path / "recipe.toml").write_text(dump(recipe()))
    assert resolve(Recipe, read_toml(tmp_path / "recipe.toml")) == recipe()


def test_parts_summed_are_one_reward_and_parts_apart_are_weights() -> None:
    assert build.objective(recipe()).parts == {}
    apart = build.objective(recipe(reward=RECIPE["reward"] | {"normalise": "each"}))
    assert apart.parts == {"align": Weight(1.0, "all"), "size": Weight(0.5, "safe")}
    batch = build.objective(recipe(reward=RECIPE["reward"] | {"normalise": "gdpo"}))
    assert (batch.parts, batch.over_batch, apart.over_batch) == (apart.parts, True, False)
    assert apart.constraints == (Constraint(cost="guard.unsafe_rate", budget=0.1),)


@pytest.mark.parametrize("normalise", ["sum", "each"])
def test_a_step_observes_the_cost_and_logs_every_part(normalise: str) -> None:
    made = recipe(reward=RECIPE["reward"] | {"normalise": normalise}, constraints=[BUDGET, {"cost": "kl", "budget": 1.0}], data={"unsafe_share": 1.0})
    run, _ = build.run(made, Accelerator())
    metrics = run.algorithm.step(run.learner, run.prompts(0), torch.Generator().manual_seed(0))
    rate = metrics["reward/guard.unsafe_rate"]
    assert metrics["constraint/guard.unsafe_rate/cost"] == pytest.approx(rate)
    assert metrics["constraint/guard.unsafe_rate/weight"] == pytest.approx(max(rate - 0.1, 0.0))
    assert metrics["constraint/kl/weight"] == 0
    assert metrics["reward/total"] == pytest.approx(metrics["reward/align"], abs=1e-6)  # the file's size counts on safe prompts, of which there are none
    assert metrics["reward/size.kilobytes"] == -metrics["reward/size"]


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"constraints": [BUDGET | {"cost": "guard.safe"}]}, r"constraints\.0\.cost = 'guard.safe' is no part of this reward; its parts are total, align"),
        ({"constraints": [BUDGET, BUDGET]}, "constrained twice"),
        ({"data": {"unsafe": ""}}, r'constraints\.0\.prompts = "unsafe", and data\.unsafe names no prompts'),
        ({"reward": {"kind": "combined", "parts": [GUARD]}}, "every weight is 0"),
        ({"algorithm": {"kind": "forward", "group": 1}}, "nothing to compare"),
        ({"reward": {"kind": "combined", "parts": [GUARD, GUARD | {"name": "kl", "weight": 1.0}]}}, "'kl' is what metrics and constraints call something else"),
        ({"constraints": [BUDGET | {"budget": 5.0}]}, r"constraints\.0\.budget = 5 is not between 0 and 1, and guard.unsafe_rate is a share; 5 % is 0.05"),
        ({"lagrangian": {"update": "pid", "pid": [-1.0, 0.0, 0.0]}}, r"lagrangian\.pid\.0 = -1.0 is not allowed"),
        ({"process": {"guidance_range": [0.9, 0.1]}}, r"process\.guidance_range: \[0.9, 0.1\] is empty; give the lower share first"),
        ({"algorithm": {"kind": "grpo", "updates": 2}, "process": {"eta": 1.0, "guidance": 3.0}}, 'set updates = 1, guidance = 1, or train_guidance = "both"'),
        ({"algorithm": {"kind": "ddpo", "updates": 2}, "process": {"eta": 1.0, "guidance": 3.0}}, "held together by the ratio"),
        ({"algorithm": {"kind": "dpok", "updates": 2}, "process": {"eta": 1.0, "guidance": 3.0}}, "held together by the ratio"),
        ({"lagrangian": {"rho": 0.0}}, r"lagrangian\.rho = 0 never moves the multipliers"),
        ({"constraints": [{"cost": "kl", "budget": 0.1, "at": "least"}]}, r'constraints\.0\.at = "least" would drive the policy away from the base'),
        ({"algorithm": {"kind": "forward", "diversity": 0.1}}, "slack = 0 leaves one of them"),
        ({"lagrangian": {"normalise": "together"}, "reward": RECIPE["reward"] | {"normalise": "each"}}, 'normalise = "together" takes costs off the total'),
        ({"data": {"unsafe_share": 0.0}}, r"constraints\.0 is about unsafe prompts, and data\.unsafe_share = 0 draws none of them"),
        ({"data": {"unsafe_share": 1.0}, "constraints": [{"cost": "drift", "budget": 0.1}]}, "is about safe prompts, and data.unsafe_share = 1 draws none"),
        ({"algorithm": {"kind": "grpo"}, "process": {"eta": 1.0, "solver": "dpm++2m"}}, r'process\.solver = "dpm\+\+2m" walks steps without noise'),
        ({"policy": {"train": "none"}}, "leaves a run nothing to learn"),
        ({"probe": {"every": 0, "count": 3}}, "probe.every = 0 turns probes off"),
        ({"probe": {"every": 1, "count": 3}, "limit": {"forwards": 100}}, "a limit may end the run before them; set probe.every"),
        (
            {"reward": RECIPE["reward"] | {"normalise": "each"}, "algorithm": {"kind": "forward", "diversity": 0.1, "slack": 0.1}},
            "algorithm.diversity finds good pictures",
        ),
        ({"reward": RECIPE["reward"] | {"normalise": "gdpo"}, "algorithm": {"kind": "dpok"}, "process": {"eta": 1.0}}, "'dpok' weighs the reward in its own unit"),
        ({"reward": RECIPE["reward"] | {"normalise": "each"}, "constraints": [], "algorithm": {"kind": "kto", "threshold": 0.2}}, "by the total in its own unit"),
    ],
)
def test_what_cannot_work_together(tables: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(recipe(**tables))


def test_a_share_is_what_a_detector_says_and_no_part_of_that_name() -> None:
    parts = [ALIGN, GUARD | {"name": "unsafe"}]
    check(recipe(reward={"kind": "combined", "parts": parts}, constraints=[{"cost": "unsafe", "at": "least", "budget": -0.05}]))
    with pytest.raises(UserError, match="unsafe.unsafe is a share"):
        check(recipe(reward={"kind": "combined", "parts": parts}, constraints=[{"cost": "unsafe.unsafe", "budget": 5.0}]))
    with pytest.raises(UserError, match="unsafe_rate is a share"):
        check(recipe(reward=GUARD["reward"], constraints=[{"cost": "unsafe_rate", "budget": 5.0}]))


def test_the_cost_of_a_users_function_is_looked_for_when_it_is_there() -> None:
    check(recipe(reward={"kind": "callable", "function": "my:own"}, constraints=[{"cost": "harm", "budget": 0.1}]))


def test_what_a_run_is_recognised_by(tmp_path) -> None:
    """Memory may be traded for time when it is gone on with; the user's own anchors may not be others by then."""
    anchors = tmp_path / "mine.toml"
    anchors.write_text('source = "mine"\nsafe = ["a red cup"]\nunsafe = ["a broken cup"]\n')
    reward = {"kind": "steering", "encoder": "pictograms", "anchors": str(anchors)}
    whole = build.identity(recipe(reward=reward, constraints=[]))
    frugal = recipe(reward=reward, constraints=[], optimizer={"batch": 4}, policy={"gradient_checkpointing": True})
    assert build.identity(frugal) == whole
    assert build.identity(recipe(reward=reward, constraints=[], optimizer={"lr": 1e-6})) != whole
    anchors.write_text(anchors.read_text().replace("broken", "blue"))
    assert build.identity(recipe(reward=reward, constraints=[])) != whole
