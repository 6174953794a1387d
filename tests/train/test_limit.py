"""A limit ends a run before its steps are done, and a falling learning rate knows how far it is."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from safediffusion.train.limit import Limit
from safediffusion.train.loop import train
from safediffusion.train.optimizer import OptimizerSettings, rate


def test_the_share_that_is_used() -> None:
    assert Limit().share(1e9, 1e9, 1e9) == 0
    assert Limit(forwards=100).share(25, 1e9, 1e9) == 0.25
    assert Limit(forwards=100, cpu_seconds=2).share(25, 1, 1e9) == 0.5
    assert Limit(wall_seconds=4, cpu_seconds=2).share(1e9, 1, 3) == 0.75


def test_a_run_ends_with_the_iteration_that_reaches_its_forwards_and_goes_no_further(make_run: Callable, read_metrics: Callable, tmp_path: Path) -> None:
    quiet = Console(file=io.StringIO())
    each = train(make_run(steps=1), tmp_path / "one", quiet).forwards
    run = replace(make_run(steps=100, checkpoint_every=50), limit=Limit(forwards=1.5 * each))
    progress = train(run, tmp_path / "two", quiet)
    assert (progress.step, progress.forwards) == (2, 2 * each)
    assert 0 < progress.trained <= progress.cpu_seconds
    again = replace(make_run(steps=100), limit=Limit(forwards=1.5 * each))
    assert train(again, tmp_path / "two", quiet) == progress  # its last checkpoint was written at the end
    assert len(read_metrics(tmp_path / "two")) == 2


@pytest.mark.parametrize("clock", ["cpu_seconds", "wall_seconds"])
def test_a_run_ends_with_its_seconds(make_run: Callable, tmp_path: Path, clock: str) -> None:
    progress = train(replace(make_run(steps=100), limit=Limit(**{clock: 1e-6})), tmp_path / "run", Console(file=io.StringIO()))
    assert progress.step == 1
    assert 0 < progress.trained_wall <= progress.seconds


def test_a_falling_rate_goes_by_the_share_that_is_used(make_run: Callable, tmp_path: Path) -> None:
    quiet = Console(file=io.StringIO())
    each = train(make_run(steps=1), tmp_path / "one", quiet).forwards
    options, rates = OptimizerSettings(lr=1e-3, schedule="linear"), []

    def noted(step: float) -> float:
        rates.append(rate(options, step, 101))
        return rates[-1]

    train(replace(make_run(steps=101), limit=Limit(forwards=4 * each), rate=noted), tmp_path / "run", quiet)
    assert rates == pytest.approx([1e-3 * (1 - 0.9 * share) for share in (0, 0.25, 0.5, 0.75)])
