"""Measuring changes nothing, and puts every second somewhere."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from safediffusion import build, seeds
from safediffusion.bench.clock import PARTS, Clock, watch
from safediffusion.bench.contestants import contestants, find_recipe
from safediffusion.bench.machine import forget_peak, peak_bytes, product_rate
from safediffusion.bench.race import race
from safediffusion.config import read_toml

ROOT = Path(__file__).parents[2]
SMALL = ("algorithm.prompts=2", "algorithm.group=2", "process.steps=3")


def test_a_clock_changes_no_weight() -> None:
    recipe = contestants(["demo"], None, SMALL)[0].recipe
    ended = []
    for clocked in (False, True):
        run, _ = build.run(recipe, Accelerator())
        if clocked:
            watch(run.learner)
        run.algorithm.step(run.learner, run.prompts(0), seeds.generator("train", 0, 0, 0))
        ended.append(run.learner.policy.state())
    assert all(torch.equal(ended[0][name], ended[1][name]) for name in ended[0])


def test_parts_share_an_iteration_and_do_not_nest() -> None:
    clock = Clock(torch.device("cpu"))

    def work() -> None:
        with clock.part("rollout"), clock.part("decode"):
            time.sleep(0.02)
        time.sleep(0.01)

    seconds, parts = clock.iteration(work)
    assert set(parts) == set(PARTS)
    assert sum(parts.values()) == pytest.approx(seconds)
    assert parts["decode"] == 0
    assert parts["rollout"] >= 0.02
    assert parts["other"] >= 0.01


def test_recipes_take_turns() -> None:
    field = contestants(["paper", "demo"], None, SMALL)
    heard: list[str] = []
    laps, runs = race(field, 2, torch.device("cpu"), heard.append)
    assert heard == ["paper", "demo"] * 3  # a warm-up and two rounds
    assert set(laps) == set(runs) == {"paper", "demo"}
    for found in laps.values():
        assert [lap.images for lap in found] == [4, 4]
        assert all(lap.forwards == lap.predicted for lap in found)
        assert all(lap.peak_bytes > 1e8 for lap in found)


def test_the_machine_is_measured() -> None:
    device = torch.device("cpu")
    assert product_rate(device, "float32", seconds=0.01) > 1e8
    forget_peak(device)
    before = peak_bytes(device)
    block = torch.ones(50_000_000)
    assert peak_bytes(device) - before > 0.8 * block.nbytes


def test_the_papers_recipe_is_the_one_for_stable_diffusion_on_the_embedded_model() -> None:
    ours, theirs = read_toml(find_recipe("paper")), read_toml(ROOT / "recipes" / "paper-sd15.toml")
    assert ours["algorithm"] == theirs["algorithm"]
    assert ours["process"] == theirs["process"]
    assert ours["steps"] == theirs["steps"]
    assert ours["policy"]["train"] == theirs["policy"]["train"]
    for table, but in (("reward", {"encoder", "anchors"}), ("optimizer", {"batch"}), ("data", {"safe", "unsafe"}), ("probe", set())):
        one, other = ({key: value for key, value in each[table].items() if key not in but} for each in (ours, theirs))
        assert one == other, table
