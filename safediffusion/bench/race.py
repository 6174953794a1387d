"""Iterations of several recipes, in turns: what the machine does beside them befalls all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from safediffusion import build, seeds
from safediffusion.bench.clock import Clock, watch
from safediffusion.bench.contestants import Contestant
from safediffusion.bench.machine import forget_peak, peak_bytes
from safediffusion.cost.forwards import forwards
from safediffusion.train.loop import Run


@dataclass(frozen=True)
class Lap:
    """One iteration. `parts` are wall seconds that sum to `seconds`; `predicted` forwards are None where nobody counts them."""

    images: int
    seconds: float
    cpu_seconds: float  # of this process
    parts: dict[str, float]
    forwards: float  # as the learner counted them
    predicted: float | None
    peak_bytes: int


@dataclass(frozen=True, eq=False)
class _Lane:
    contestant: Contestant
    run: Run
    clock: Clock


def race(
    field: Sequence[Contestant], repeats: int, device: torch.device, passed: Callable[[str], Any] = lambda name: None
) -> tuple[dict[str, list[Lap]], dict[str, Run]]:
    """`repeats` iterations of each recipe, round by round, after a warm-up of one group each; and the runs they are of.

    All recipes lie in memory together. `passed` hears the name after each lap and warm-up.
    """
    lanes = []
    for contestant in field:
        run, _ = build.run(contestant.recipe, Accelerator(cpu=device.type == "cpu"))
        lanes.append(_Lane(contestant, run, watch(run.learner)))
    for lane in lanes:
        _iterate(lane, -1, 1)
        passed(lane.contestant.name)
    laps: dict[str, list[Lap]] = {lane.contestant.name: [] for lane in lanes}
    for repeat in range(repeats):
        for lane in lanes:
            laps[lane.contestant.name].append(_lap(lane, repeat, device))
            passed(lane.contestant.name)
    return laps, {lane.contestant.name: lane.run for lane in lanes}


def _lap(lane: _Lane, repeat: int, device: torch.device) -> Lap:
    recipe, learner = lane.contestant.recipe, lane.run.learner
    prompts = lane.run.prompts(repeat)
    expected = forwards(recipe, sum(prompt.unsafe for prompt in prompts), learner.process)
    forget_peak(device)
    before, cpu = learner.forwards, time.process_time()
    seconds, parts = lane.clock.iteration(lambda: _iterate(lane, repeat, len(prompts)))
    return Lap(
        images=len(prompts) * recipe.algorithm.group,
        seconds=seconds,
        cpu_seconds=time.process_time() - cpu,
        parts=parts,
        forwards=learner.forwards - before,
        predicted=expected.counted if expected else None,
        peak_bytes=peak_bytes(device),
    )


def _iterate(lane: _Lane, number: int, count: int) -> None:
    """What the loop does in an iteration that neither probes nor saves, on the first `count` of its prompts."""
    run, step = lane.run, max(number, 0)
    for group in run.learner.optimizer.param_groups:
        group["lr"] = run.rate(step)
    run.learner.iteration = step
    run.algorithm.step(run.learner, run.prompts(step)[:count], seeds.generator("bench", run.seed, number))
    with lane.clock.part("optimizer"):
        run.average.update()
