"""Out of memory, a step is repeated with fewer pictures at once, and its result stays."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from safediffusion.algorithms.lagrangian import AugmentedLagrangian
from safediffusion.algorithms.objective import Constraint, Objective
from safediffusion.errors import UserError
from safediffusion.train.loop import Run, train
from safediffusion.types import Prompt


def holding(most: int) -> Callable[[Tensor, Sequence[Prompt]], Tensor]:
    """A reward of redness on a device that holds `most` pictures."""

    def reward(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        if len(images) > most:
            raise torch.OutOfMemoryError(f"CUDA out of memory: {len(images)} pictures")
        return images[:, 0].mean((1, 2))

    return reward


def weights(run: Run) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in run.learner.parameters])


@pytest.mark.parametrize("algorithm", ["forward", "grpo"])
def test_fewer_pictures_at_once_give_the_same_result(tmp_path: Path, make_run: Callable[..., Run], algorithm: str) -> None:
    whole, small = make_run(algorithm=algorithm, steps=2), make_run(algorithm=algorithm, steps=2, reward=holding(1))
    train(whole, tmp_path / "whole", Console(file=io.StringIO()))
    with pytest.warns(UserWarning, match="out of memory: going on with") as warned:
        train(small, tmp_path / "small", Console(file=io.StringIO()))
    assert [int(str(each.message).split("with ")[1].split()[0]) for each in warned] == [2, 1]
    assert small.learner.batch == 1
    assert small.learner.forwards == whole.learner.forwards
    torch.testing.assert_close(weights(small), weights(whole), atol=2e-4, rtol=1e-3)


def test_a_repeated_step_remembers_its_scores_and_moves_its_multipliers_once(tmp_path: Path, make_run: Callable[..., Run]) -> None:
    """Memory runs out while gradients are taken: the baseline and the constraint have heard of the rollout by then."""
    whole, small = (make_run(algorithm="ddpo", steps=3) for _ in range(2))
    for run in (whole, small):
        budget = Constraint(cost="total", budget=0.1, prompts="all", smooth=0.5)
        run.learner.objective = Objective(constraints=(budget,), lagrangian=AugmentedLagrangian(update="ascent", rate=1.0))
    policy: Any = small.learner.policy
    predict = policy.predict

    def cramped(x: Tensor, *arguments: Any) -> Tensor:
        if torch.is_grad_enabled() and len(x) > 1:
            raise torch.OutOfMemoryError(f"CUDA out of memory: {len(x)} pictures")
        return predict(x, *arguments)

    policy.predict = cramped
    train(whole, tmp_path / "whole", Console(file=io.StringIO()))
    with pytest.warns(UserWarning, match="out of memory: going on with"):
        train(small, tmp_path / "small", Console(file=io.StringIO()))
    assert small.learner.batch == 1
    assert {"constraints.lam", "baseline.total.scores"} <= set(whole.learner.memory)
    assert whole.learner.memory["constraints.lam"].item() > 0
    assert small.learner.memory.keys() == whole.learner.memory.keys()
    for name, value in whole.learner.memory.items():
        torch.testing.assert_close(small.learner.memory[name], value, atol=1e-4, rtol=1e-3, equal_nan=True, msg=name)
    torch.testing.assert_close(weights(small), weights(whole), atol=2e-4, rtol=1e-3)


def test_without_room_for_one_picture_the_run_says_what_to_do(tmp_path: Path, make_run: Callable[..., Run]) -> None:
    with pytest.warns(UserWarning, match="out of memory"), pytest.raises(UserError, match="iteration 1: out of memory with 1 pictures per forward; set"):
        train(make_run(reward=holding(0)), tmp_path, Console(file=io.StringIO()))


def test_an_optimizer_that_ran_out_of_memory_halfway_is_not_repeated(tmp_path: Path, make_run: Callable[..., Run]) -> None:
    run = make_run(algorithm="forward", steps=1)
    step, calls = run.learner.optimizer.step, []

    def halfway(*arguments: Any) -> None:
        step(*arguments)
        calls.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory: moments")

    run.learner.optimizer.step = halfway
    with pytest.raises(UserError, match="out of memory with .* pictures per forward"):
        train(run, tmp_path / "run", Console(file=io.StringIO()))
    assert len(calls) == 1
