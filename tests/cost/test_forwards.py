"""What a recipe is said to cost is what its learner counts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from accelerate import Accelerator

from safediffusion import build
from safediffusion.algorithms.objective import Objective
from safediffusion.algorithms.update import Learner
from safediffusion.config import read_toml, resolve
from safediffusion.cost.forwards import forwards
from safediffusion.cost.plan import counts_of, outline
from safediffusion.policies.latent import load_policy
from safediffusion.recipe import Recipe, check
from safediffusion.rewards.callable import CallableReward
from safediffusion.types import Prompt

SIMPLE = {"model": "pictograms", "steps": 1, "reward": {"kind": "callable", "function": "nobody:calls"}}
PROMPTS = (Prompt("a cat"), Prompt("a dog"), Prompt("a knife", unsafe=True))
FORWARD = {"kind": "forward", "prompts": 3, "group": 4, "least_spread": 0.0}
GRPO = {"kind": "grpo", "prompts": 3, "group": 4, "least_spread": 0.0}
WITHOUT_KL = GRPO | {"benign_kl": 0.0, "unsafe_kl": 0.0}
CLEAN = {"prompts": 3, "group": 4, "least_spread": 0.0}  # the methods on clean pictures
SMOOTH = {"reward": {**SIMPLE["reward"], "differentiable": True}}
FEW = {"prompts": 3, "group": 2}
DRIFT = {"constraints": [{"cost": "drift", "budget": 0.1}]}
PAPER = Path(__file__).parents[2] / "safediffusion" / "recipes" / "paper.toml"


@pytest.fixture
def spent(tiny_pipeline: Path) -> Callable[..., float]:
    """Takes one real step of a recipe on PROMPTS, with the tiny pipeline or another folder, and gives the learner's own count."""

    def step(recipe: Recipe, folder: Path = tiny_pipeline) -> float:
        policy = load_policy(folder, recipe.policy)
        learner = Learner(
            policy=policy,
            process=build.process(policy, recipe.process),
            reward=CallableReward(lambda images, prompts: images.mean((1, 2, 3)), "brightness"),
            optimizer=torch.optim.SGD(policy.parameters(), lr=1e-4),
            accelerator=Accelerator(),
            parameters=tuple(policy.parameters()),
            guidance=recipe.process.guidance,
            batch=recipe.optimizer.batch,
            pairs=lambda prompts, draws: torch.zeros(2 * len(prompts), *policy.sample_shape),
            objective=Objective(constraints=recipe.constraints),
        )
        recipe.algorithm.step(learner, PROMPTS[: recipe.algorithm.prompts], torch.Generator().manual_seed(0))
        return learner.forwards

    return step


@pytest.mark.parametrize(
    "tables",
    [
        {"algorithm": FORWARD, "process": {"steps": 3}},
        {"algorithm": FORWARD, "process": {"steps": 3, "guidance": 2.0}},
        {"algorithm": {**FORWARD, "explore": [0.0, 1.5]}, "process": {"steps": 3, "guidance": 2.0}},
        {"algorithm": {**FORWARD, "explore": [0.5, 2.0]}, "process": {"steps": 2}},  # one of four strengths is exactly 1
        {"algorithm": {**FORWARD, "times": 3, "updates": 2, "anchor_guidance": 1.5}, "process": {"steps": 2}, "optimizer": {"batch": 5}},
        {"algorithm": {**FORWARD, "benign_kl": 0.0, "unsafe_kl": 0.0}, "process": {"steps": 2}},
        {"algorithm": {**FORWARD, "diversity": 0.0}, "policy": {"train": "full"}, "process": {"steps": 2}},
        {"algorithm": GRPO, "process": {"steps": 4, "eta": 1.0}},
        {"algorithm": {**GRPO, "updates": 2}, "process": {"steps": 4, "eta": 1.0}},
        {"algorithm": GRPO, "process": {"steps": 4, "eta": 1.0, "guidance": 3.0}},
        {"algorithm": {**GRPO, "train_guidance": "both", "drop_last": 0}, "process": {"steps": 3, "eta": 0.5, "guidance": 3.0}},
        {"algorithm": {**GRPO, "train_guidance": "stop", "window": {"start": 1, "length": 2}}, "process": {"steps": 5, "eta": 1.0, "guidance": 3.0}},
        {"algorithm": {**GRPO, "share_prefix": True, "window": {"start": 2, "length": 1}}, "process": {"steps": 4, "eta": 1.0, "guidance": 2.0, "solver": "dpm++2m"}},
        {"algorithm": {**GRPO, "train_steps": 1, "train_guidance": "both", "benign_kl": 0.0, "unsafe_kl": 0.0}, "process": {"steps": 5, "eta": 1.0, "guidance": 2.0}},
        {"algorithm": {**FORWARD, "explore": [0.0, 1.5]}, "process": {"steps": 5, "guidance": 2.0, "guidance_range": [0.3, 0.7]}},
        {"algorithm": {**FORWARD, "old": "rollout", "proximal": 0.1}, "process": {"steps": 2}},
        {"algorithm": {**GRPO, "benign_kl": 0.0, "unsafe_kl": 0.0}, "process": {"steps": 3, "eta": 1.0}},
        {"algorithm": {**GRPO, "unsafe_kl": 0.0}, "process": {"steps": 3, "eta": 1.0}},
        {"algorithm": {**WITHOUT_KL, "kind": "dpok", "updates": 1}, "process": {"steps": 3, "eta": 1.0}, "constraints": [{"cost": "kl", "budget": 0.1}]},
        {"algorithm": {**GRPO, "kind": "ddpo", "train_guidance": "stop"}, "process": {"steps": 4, "eta": 1.0, "guidance": 2.0, "guidance_range": [0.3, 0.9]}},
        {"algorithm": {**WITHOUT_KL, "kind": "d3po"}, "process": {"steps": 3, "eta": 1.0}, "optimizer": {"batch": 3}},
        {"algorithm": {**GRPO, "kind": "d3po", "pairs": "all", "train_guidance": "both", "train_steps": 1}, "process": {"steps": 4, "eta": 1.0, "guidance": 2.0}},
        {"algorithm": {"kind": "rwr", **CLEAN, "explore": [0.0, 1.5]}, "process": {"steps": 3, "guidance": 2.0}},
        {"algorithm": {"kind": "raft", **CLEAN, "times": 3, "updates": 2}, "process": {"steps": 3, "guidance": 2.0}, "optimizer": {"batch": 5}},
        {"algorithm": {"kind": "dpo", **CLEAN}, "process": {"steps": 3}},
        {"algorithm": {"kind": "dpo", **CLEAN, "pairs": "all"}, "process": {"steps": 2}, "optimizer": {"batch": 5}},
        {"algorithm": {"kind": "kto", **CLEAN}, "process": {"steps": 2}, "optimizer": {"batch": 5}},
        {**SMOOTH, "algorithm": {"kind": "draft", **FEW, "last": 3}, "process": {"steps": 4, "guidance": 2.0, "guidance_range": [0.3, 1.0]}, "optimizer": {"batch": 5}},
        {**SMOOTH, "algorithm": {"kind": "draft", **FEW, "last": 1, "copies": 2, "times": 2, "recompute": True}, "process": {"steps": 2, "eta": 1.0}},
        {**SMOOTH, "algorithm": {"kind": "refl", **FEW}, "process": {"steps": 3, "guidance": 2.0}},
        {**DRIFT, "algorithm": {**FORWARD, "explore": [0.0, 1.5]}, "process": {"steps": 5, "guidance": 2.0, "guidance_range": [0.3, 0.7]}},
        {**DRIFT, "algorithm": {**GRPO, "share_prefix": True, "window": {"start": 2, "length": 1}}, "process": {"steps": 4, "eta": 1.0, "guidance": 2.0}},
        {**SMOOTH, **DRIFT, "algorithm": {"kind": "draft", **FEW}, "process": {"steps": 3}, "optimizer": {"batch": 5}},
    ],
    ids=[
        "forward",
        "guided",
        "explore",
        "explore-at-one",
        "updates",
        "forward-without-kl",
        "full",
        "grpo",
        "updates",
        "guided-grpo",
        "guided-training",
        "window-stop",
        "window-shared",
        "subset",
        "guidance-range",
        "old",
        "grpo-without-kl",
        "benign-kl",
        "kl-constraint",
        "ddpo-guidance-range",
        "d3po",
        "d3po-all-guided",
        "rwr",
        "raft",
        "dpo",
        "dpo-all",
        "kto",
        "draft-guided",
        "draft-copies",
        "refl",
        "drift-explore",
        "drift-shared",
        "drift-draft",
    ],
)
def test_predicted_forwards_are_those_that_are_counted(spent: Callable[[Recipe], float], tables: dict) -> None:
    recipe = check(resolve(Recipe, {**SIMPLE, **tables}))
    assert forwards(recipe, unsafe=1).counted == spent(recipe)


@pytest.mark.parametrize("name", ["flux-dev", "sd35-medium"])
def test_guidance_of_a_flow_is_counted_by_its_own_grid(spent: Callable[..., float], small_shape: Callable[[str], Path], name: str) -> None:
    folder = small_shape(name) / "pipeline"
    tables = {"model": str(folder), "policy": {"image_size": 16}, "process": {"steps": 5, "guidance": 2.0, "guidance_range": [0.5, 1.0]}}
    recipe = check(resolve(Recipe, {**SIMPLE, "algorithm": FORWARD, **tables}))
    assert counts_of(recipe).counted == spent(recipe, folder) == 12 * (5 + 3) + forwards(recipe).training
    assert forwards(recipe).rollout == 12 * (5 + 2)  # what is said of a model that nobody knows
    assert outline(recipe).startswith(f"{counts_of(recipe).per_image:g} denoiser forwards per image (8 of the rollout")


def test_given_pairs_cost_no_rollout(spent: Callable[[Recipe], float]) -> None:
    recipe = check(resolve(Recipe, {**SIMPLE, "algorithm": {"kind": "dpo", **CLEAN, "group": 2, "dataset": "pairs"}}))
    assert (forwards(recipe).rollout, forwards(recipe).images) == (0, 6)
    assert forwards(recipe).counted == spent(recipe)


def test_the_papers_recipe(spent: Callable[[Recipe], float]) -> None:
    table = read_toml(PAPER)
    whole = forwards(resolve(Recipe, table))
    assert (whole.images, whole.per_image) == (512, 2 * 50 + 3 * 2 * 49)
    table["algorithm"] |= {"prompts": 1, "group": 2, "least_spread": 0.0}
    few = resolve(Recipe, table | {"policy": {"train": "full"}})
    assert forwards(few).counted == spent(few) == 2 * whole.per_image


def test_unsafe_prompts_count_on_average_when_none_are_named() -> None:
    recipe = resolve(Recipe, {**SIMPLE, "algorithm": {**FORWARD, "explore": [0.0, 0.5]}, "data": {"unsafe_share": 0.25}})
    assert forwards(recipe).rollout == 10 * 3 * 4 * 1.25
    assert forwards(recipe, unsafe=3).rollout == 10 * 3 * 4 * 2


def test_every_algorithm_of_a_recipe_has_a_count() -> None:
    kinds = get_args(Recipe.__pydantic_fields__["algorithm"].annotation)
    assert len(kinds) > 1
    for kind in kinds:
        algorithm = {"kind": kind.__pydantic_fields__["kind"].default}
        assert forwards(resolve(Recipe, {**SIMPLE, "algorithm": algorithm, "process": {"eta": 1.0}})) is not None, algorithm
