"""DPM-Solver++(2M) against diffusers, and windows of noise between its steps."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from safediffusion.process import from_scheduler
from safediffusion.types import Process

SD1 = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1, "set_alpha_to_one": False}
SHAPE = (2, 4, 8, 8)


def draw(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def walked(process: Process, outputs: list[Tensor], x: Tensor) -> list[Tensor]:
    states, before = [], None
    for step, output in enumerate(outputs):
        x, before = process.advance(output, x, step, before)
        states.append(x)
    return states


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' scheduler, at numpy 2
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("steps", [4, 10, 14, 15, 25, 50])
def test_steps_are_those_of_diffusers(prediction: str, steps: int) -> None:
    process = from_scheduler(SD1 | {"prediction_type": prediction}, steps, 0.0, "dpm++2m")
    config = {k: v for k, v in SD1.items() if k not in ("steps_offset", "set_alpha_to_one")}
    oracle = DPMSolverMultistepScheduler(**config, prediction_type=prediction, algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type="sigma_min")
    oracle.set_timesteps(timesteps=process.times.tolist())
    outputs, x = [draw(step) for step in range(steps)], draw(1000)
    expected, theirs = [], x
    for time, output in zip(oracle.timesteps, outputs, strict=True):
        theirs = oracle.step(output, time, theirs).prev_sample
        expected.append(theirs)
    for ours, wanted in zip(walked(process, outputs, x), expected, strict=True):
        torch.testing.assert_close(ours, wanted, atol=2e-4, rtol=2e-4)


def test_ddim_and_a_first_step_have_no_momentum() -> None:
    plain, second = (from_scheduler(SD1, 20, 0.0, solver) for solver in ("ddim", "dpm++2m"))
    assert {step.momentum for step in plain.steps} == {0.0}
    assert second.steps[0].momentum == 0 and all(step.momentum > 0 for step in second.steps[1:])
    x, output = draw(0), draw(1)
    assert torch.equal(second.advance(output, x, 5, None)[0], plain.kernel(output, x, 5).mean)


def test_a_solver_of_second_order_comes_nearer_to_the_exact_solution() -> None:
    """Data N(m, c^2): the best prediction is linear in x, and the exact solution keeps (x - a m) / sqrt(a^2 c^2 + s^2)."""
    mean, spread, x = 0.5, 0.3, draw(3)
    errors = {}
    for solver in ("ddim", "dpm++2m"):
        process, before, state = from_scheduler(SD1, 16, 0.0, solver), None, x
        for step, time in enumerate(process.times.tolist()):
            abar = float(process.schedule.alphas_cumprod[time])
            variance = abar * spread**2 + 1 - abar
            epsilon = math.sqrt(1 - abar) * (state - math.sqrt(abar) * mean) / variance
            state, before = process.advance(epsilon, state, step, before)
        first, last = float(process.schedule.alphas_cumprod[int(process.times[0])]), process.schedule.final_alpha_cumprod
        wide = [math.sqrt(abar * spread**2 + 1 - abar) for abar in (first, last)]
        exact = math.sqrt(last) * mean + wide[1] / wide[0] * (x - math.sqrt(first) * mean)
        errors[solver] = float((state - exact).abs().max())
    assert errors["dpm++2m"] < 0.7 * errors["ddim"]


@pytest.mark.parametrize("window", [(0, 1), (2, 3), (5,)])
def test_noise_is_added_in_the_window_alone(window: tuple[int, ...]) -> None:
    process = from_scheduler(SD1, 8, 1.0)
    windowed = dataclasses.replace(process, window=window, solver="dpm++2m")
    assert windowed.stochastic_steps == window
    for step in window:
        assert windowed.steps[step][:-1] == process.steps[step][:-1]
        assert windowed.steps[step].momentum == 0


def test_the_last_step_is_without_noise_even_in_a_window() -> None:
    process = from_scheduler(SD1, 4, 1.0)
    assert dataclasses.replace(process, window=(2, 3)).stochastic_steps == (2,)


def test_guidance_acts_in_its_range() -> None:
    process = from_scheduler(SD1, 10, 0.0, guidance_range=(0.2, 0.7))
    assert [process.guides(step) for step in range(10)] == [200 <= time <= 700 for time in process.times.tolist()]
