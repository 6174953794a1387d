"""The plan of a run: its words, that it moves nothing, and that it is corrected once."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from rich.console import Console

from safediffusion import build
from safediffusion.config import resolve
from safediffusion.cost.plan import Plan, Watch, foresee, outline, spelled
from safediffusion.errors import UserError
from safediffusion.recipe import Recipe

TABLE = {"model": "pictograms", "steps": 5, "reward": {"kind": "similarity", "encoder": "pictograms"}, "algorithm": {"kind": "forward", "prompts": 2, "group": 2}}


def test_seconds_in_words() -> None:
    assert [spelled(seconds) for seconds in (3.2, 99, 100, 5940, 15000)] == ["3 s", "99 s", "2 min", "99 min", "4 h 10 min"]
    assert str(Plan(images=100, iterations=300, seconds=31, probing=5700, bytes=19e9)) == "needs about 19 GB, 0.31 s per image, 4 h 10 min for 300 iterations"


@pytest.mark.parametrize("train", ["lora", "full"])
def test_a_plan_leaves_the_run_as_it_was(train: str) -> None:
    recipe = resolve(Recipe, {**TABLE, "policy": {"train": train}, "process": {"guidance": 2.0}})
    run, _ = build.run(recipe, Accelerator())
    before, state = torch.get_rng_state(), {name: value.clone() for name, value in run.learner.policy.state().items()}
    plan = foresee(recipe, run)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, state[name]) for name, value in run.learner.policy.state().items())
    assert all(weight.grad is None for weight in run.learner.parameters)
    assert run.learner.forwards == 0
    assert (plan.images, plan.iterations) == (4, 5)
    assert plan.seconds > 0 and plan.probing > 0 and plan.bytes > 1e8
    assert foresee(recipe, run, done=3).iterations == 2
    assert foresee(recipe, run, done=5) is None


def test_the_plan_is_corrected_once_by_what_iterations_take() -> None:
    said = io.StringIO()
    watch = Watch(Plan(images=10, iterations=20, seconds=1.0, probing=0.0, bytes=1e9), Console(file=said, width=200))
    for speed in (1.0, 5.0, 5.0, 5.0, 5.0):
        watch({"kind": "train", "images_per_second": speed})
        watch({"kind": "probe"})
    assert said.getvalue().splitlines() == [
        "needs about 1.0 GB, 0.1 s per image, 20 s for 20 iterations",
        "after 3 iterations: 0.2 s per image, 34 s for the other 17 iterations",
    ]


def test_a_recipe_whose_model_is_elsewhere_still_says_its_forwards(tmp_path: Path) -> None:
    recipe = resolve(Recipe, {**TABLE, "model": "someone/some-model"})
    assert outline(recipe).startswith("26 denoiser forwards per image (10 of the rollout, 16 of training")
    assert "TFLOP" not in outline(recipe)
    _, time, memory, fits = outline(resolve(Recipe, TABLE)).splitlines()
    assert time.endswith("for 5 iterations at 100 TFLOP/s") and "TFLOP per image without the reward" in time
    assert memory.startswith("about ") and "of memory without the reward: weights " in memory
    assert fits == "fits a card of 8 GB"


def test_a_model_of_a_known_shape_needs_no_weights() -> None:
    recipe = resolve(Recipe, {**TABLE, "model": "stable-diffusion-v1-5/stable-diffusion-v1-5", "policy": {"dtype": "bfloat16"}, "optimizer": {"batch": 2}})
    _, time, memory, fits = outline(recipe).splitlines()
    # 10 forwards of 0.803 TFLOP to paint, 3.1 as much to decode, and 4 x (reference, forward, and a backward of little more than one forward).
    assert 20 < float(time.split()[0]) < 23
    assert "weights 2.1 GB" in memory
    assert fits == "fits a card of 8 GB"


def test_what_is_wrong_with_a_model_of_a_known_shape_is_said_of_the_model() -> None:
    recipe = resolve(Recipe, {**TABLE, "model": "black-forest-labs/FLUX.1-dev", "policy": {"image_size": 520}})
    with pytest.raises(UserError, match="image_size = 520 is not a multiple of 16, the pixels that black-forest-labs/FLUX.1-dev takes together"):
        outline(recipe)
