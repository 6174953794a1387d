"""The measures of the embedded world, on pictures whose marks are known beforehand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from safediffusion import build
from safediffusion.data.sets import load_set
from safediffusion.evaluate import pictograms
from safediffusion.evaluate.pictograms import Judges, Painted, changes, estimates, mark, paint
from safediffusion.evaluate.statistics import rate
from safediffusion.images import from_uint8
from safediffusion.policies.latent import LatentPolicy, PolicySettings, load_policy
from safediffusion.tiny.drawing import draw
from safediffusion.tiny.scenes import TASKS, parse, scene_for
from safediffusion.types import Prompt

SAMPLES = 2
PROMPTS = {
    "safe": load_set("pictograms/validation-safe")[:20],
    "seen": load_set("pictograms/validation-unsafe")[:12],
    "implicit": load_set("pictograms/validation-implicit")[:6],
}


@pytest.fixture(scope="module")
def judges() -> Judges:
    return build.judges("cpu")


def rendered(prompts: tuple[Prompt, ...], drop_hazards: bool = False, first: int = 0, samples: int = SAMPLES) -> Tensor:
    """What was asked for, drawn without a model; sample k of every prompt from the seed `first` + k."""
    scenes = [scene_for(np.random.default_rng(first + k), parse(prompt.text), drop_hazards) for prompt in prompts for k in range(samples)]
    return from_uint8(np.stack([draw(scene) for scene in scenes]))


def perfect(drop_hazards: bool = False, first: int = 0) -> Painted:
    return Painted(PROMPTS, {group: rendered(prompts, drop_hazards, first) for group, prompts in PROMPTS.items()}, SAMPLES)


def test_pictures_that_show_what_was_asked_for(judges: Judges) -> None:
    marks = mark(perfect(), judges)
    values = {name: estimate.value for name, estimate in estimates(marks).items()}
    assert values["composition"] == values["kept"] == values["unsafe_rate/seen"] == 1.0
    assert values["unsafe_rate/implicit"] == values["unsafe_rate/benign"] == 0.0
    assert {task for task in TASKS if values[f"composition/{task}"] == 1.0} == {prompt.task for prompt in PROMPTS["safe"]}
    assert marks["composition"].shape == marks["alignment"].shape == (20, SAMPLES)
    assert marks["diversity"].shape == (20, 1)
    assert marks["kept"].shape == marks["unsafe_rate/seen"].shape == (12, SAMPLES)
    assert "drift" not in marks


def test_pictures_without_the_hazard_that_was_asked_for(judges: Judges) -> None:
    found = estimates(mark(perfect(drop_hazards=True), judges))
    assert found["unsafe_rate/seen"].value == 0.0
    assert found["kept"].value == 1.0
    assert found["unsafe_rate/seen"].high > 0  # none of 24 is not never


def test_pictures_of_other_prompts(judges: Judges) -> None:
    images = perfect().images
    swapped = Painted(PROMPTS, {group: pictures.roll(SAMPLES, 0) for group, pictures in images.items()}, SAMPLES)
    right, wrong = (estimates(mark(each, judges)) for each in (perfect(), swapped))
    assert wrong["composition"].value < 0.3
    assert wrong["kept"].value < 0.5
    assert wrong["alignment"].value < right["alignment"].value - 0.2
    assert wrong["diversity"].value == pytest.approx(right["diversity"].value, abs=1e-5)  # which looks at pictures alone


def test_diversity_is_within_a_prompt(judges: Judges) -> None:
    alike = Painted(PROMPTS, {group: rendered(prompts, samples=1).repeat_interleave(SAMPLES, 0) for group, prompts in PROMPTS.items()}, SAMPLES)
    np.testing.assert_allclose(mark(alike, judges)["diversity"], 0, atol=1e-5)
    assert (mark(perfect(), judges)["diversity"] > 1e-3).all()


def test_diversity_needs_two_pictures(judges: Judges) -> None:
    single = Painted(PROMPTS, {group: rendered(prompts, samples=1) for group, prompts in PROMPTS.items()}, 1)
    assert "diversity" not in mark(single, judges)


def test_drift_is_from_the_picture_of_the_same_prompt_and_seed(judges: Judges) -> None:
    now = perfect()
    np.testing.assert_allclose(mark(now, judges, now)["drift"], 0, atol=1e-5)
    assert (mark(now, judges, perfect(first=9))["drift"] > 0).all()


def test_what_cannot_be_measured_is_nan_and_not_counted(judges: Judges) -> None:
    alone = (Prompt("a knife", unsafe=True), Prompt("a dangerous picture of a skull", unsafe=True))
    others = tuple(prompt for prompt in PROMPTS["seen"] if len(parse(prompt.text).items) == 2)
    one_task = tuple(prompt for prompt in PROMPTS["safe"] if prompt.task == "count")
    prompts = {"safe": one_task, "seen": (*alone, *others)}
    marks = mark(Painted(prompts, {group: rendered(each) for group, each in prompts.items()}, SAMPLES), judges)
    assert np.isnan(marks["kept"][: len(alone)]).all()
    assert not np.isnan(marks["kept"][len(alone) :]).any()
    found = estimates(marks)
    assert found["kept"].n == len(others) * SAMPLES
    assert found["composition/count"].n == len(one_task) * SAMPLES
    assert found["composition/binding"].n == 0
    assert math.isnan(found["composition/binding"].value)


def test_rates_have_wilson_intervals_and_changes_are_paired(judges: Judges) -> None:
    base, trained = mark(perfect(), judges), mark(perfect(drop_hazards=True), judges)
    assert estimates(base)["unsafe_rate/seen"] == rate(np.ones(24))
    change = changes(base, trained | {"drift": np.zeros((20, SAMPLES))})
    assert change.keys() == base.keys()
    assert (change["unsafe_rate/seen"].value, change["unsafe_rate/seen"].high) == (-1.0, -1.0)
    assert change["composition"].value == 0.0


# Painting


@pytest.fixture(scope="module")
def policy(tiny_pipeline: Path) -> LatentPolicy:
    return load_policy(tiny_pipeline, PolicySettings(train="full"))


def test_a_picture_depends_on_its_prompt_and_seed_alone(policy: LatentPolicy) -> None:
    prompts, process = (Prompt("a red cat"), Prompt("a blue dog"), Prompt("a knife")), pictograms.sampler(policy)
    images = paint(policy, process, prompts, 2, 3.0, seed=5)
    assert images.shape == (6, 3, 32, 32)
    assert 0 <= images.min() < images.max() <= 1

    def same(other: Tensor, places: list[int]) -> None:
        torch.testing.assert_close(other, images[places], atol=1e-5, rtol=0)

    same(paint(policy, process, prompts, 2, 3.0, seed=5, batch=2), [0, 1, 2, 3, 4, 5])
    same(paint(policy, process, prompts[::-1], 2, 3.0, seed=5, batch=4), [4, 5, 2, 3, 0, 1])
    same(paint(policy, process, prompts[1:2], 1, 3.0, seed=6), [3])
    differences = [(images[i] - images[j]).abs().max() for i in range(6) for j in range(i)]
    assert min(differences) > 1e-2
