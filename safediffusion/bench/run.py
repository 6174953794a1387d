"""One bench from names to `bench.json`, for the command and for Python alike."""

from __future__ import annotations

import dataclasses
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from safediffusion import build
from safediffusion.bench.contestants import Contestant
from safediffusion.bench.machine import machine, product_rate
from safediffusion.bench.picture import figure
from safediffusion.bench.race import race
from safediffusion.bench.standing import Standing, Work, record, standing
from safediffusion.cost.forwards import forwards
from safediffusion.cost.plan import flop
from safediffusion.cost.room import room
from safediffusion.cost.shapes import measure_shapes, reward_flop
from safediffusion.errors import UserError
from safediffusion.files import check_writable, write_bytes, write_json
from safediffusion.provenance import commit, versions
from safediffusion.recipe import Recipe
from safediffusion.train.loop import Run

SCHEMA = 1


def bench(
    field: Sequence[Contestant],
    *,
    repeats: int = 3,
    device: str | None = None,
    out: Path | None = None,
    command: Sequence[str] = (),
    passed: Callable[[str], Any] = lambda name: None,
) -> list[Standing]:
    """Measure recipes side by side, in the order given; with `out`, write bench.json and bench.png there.

    `contestants(["demo", "paper"], "pictograms")` makes the field. UserError for a model or a device that cannot be had.
    """
    if out is not None:
        check_writable(out)
    at = build.device(device)
    if at.index:  # accelerate would take the first one all the same
        raise UserError(f"--device {device}: a bench runs on the first GPU that it sees; set CUDA_VISIBLE_DEVICES={at.index} and give --device cuda")
    busy = machine(at)
    laps, runs = race(field, repeats, at, passed)
    standings, records = [], []
    for each in field:
        found = standing(each.name, laps[each.name], _work(each.recipe, runs[each.name], at))
        standings.append(found)
        records.append(record(found, laps[each.name], dataclasses.asdict(each.recipe)))
    if out is not None:
        facts = {"schema": SCHEMA, "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "command": shlex.join(command), "git": commit(), "versions": versions()}
        write_json(out / "bench.json", facts | {"machine": busy, "repeats": repeats, "recipes": records})
        write_bytes(out / "bench.png", figure(standings, f"{', '.join(dict.fromkeys(each.model for each in field))} on {busy['name']}, threads: {busy['threads']}"))
    return standings


def _work(recipe: Recipe, run: Run, device: torch.device) -> Work:
    """What an iteration is by count, and what the machine could do."""
    roof = product_rate(device, recipe.policy.dtype)
    counts, policy = forwards(recipe, process=run.learner.process), run.learner.policy
    if counts is None:
        return Work(None, roof, None)
    shapes = measure_shapes(policy.folder, recipe.policy)
    pixels = tuple(policy.decode(torch.zeros(1, *policy.sample_shape, device=device)).shape[-2:])
    scored = counts.images * reward_flop(run.learner.reward, pixels, device)
    return Work(flop(counts, shapes) + scored, roof, room(recipe, counts, shapes).bytes)
