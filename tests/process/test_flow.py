"""The rectified flow against diffusers' schedulers, the coefficient-preserving sampler and closed forms."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import numpy
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor

from safediffusion.process import from_scheduler
from safediffusion.process.flow import tokens_in
from safediffusion.types import Process

SD3 = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
FLUX = {**SD3, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
SCHNELL = {**SD3, "shift": 1.0, "even_sigmas": True}  # FluxPipeline walks its own grid, whatever shifts it
SHAPE = (2, 4, 8, 8)
TOKENS = 1024
GRIDS = {"sd3": SD3, "unshifted": {**SD3, "shift": 1.0}, "flux": FLUX, "linear": {**FLUX, "time_shift_type": "linear"}, "schnell": SCHNELL}
every_grid = pytest.mark.parametrize("config", GRIDS.values(), ids=GRIDS)


def draw(seed: int, count: int) -> tuple[Tensor, ...]:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed)).unbind()


def euler(config: dict, steps: int) -> FlowMatchEulerDiscreteScheduler:
    """As StableDiffusion3Pipeline and FluxPipeline set it up."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_config({key: value for key, value in config.items() if key != "even_sigmas"})
    mu = calculate_shift(TOKENS) if "use_dynamic_shifting" in config else None
    if mu or "even_sigmas" in config:
        scheduler.set_timesteps(sigmas=numpy.linspace(1.0, 1 / steps, steps), mu=mu)
    else:
        scheduler.set_timesteps(steps)
    return scheduler


@every_grid
@pytest.mark.parametrize("steps", [1, 4, 28])
def test_without_noise_every_step_is_diffusers_euler_step(config: dict, steps: int) -> None:
    process, oracle = from_scheduler(config, steps, eta=0.0, tokens=TOKENS), euler(config, steps)
    assert torch.equal(process.times, oracle.timesteps)
    for step, time in enumerate(oracle.timesteps):
        x, output = draw(step, 2)
        expected = oracle.step(output, time, x).prev_sample
        torch.testing.assert_close(process.advance(output, x, step, None)[0], expected, atol=2e-6, rtol=1e-5)


def test_a_dynamic_shift_with_the_other_grid_is_that_of_stable_diffusion_3() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(FLUX)
    scheduler.set_timesteps(8, mu=calculate_shift(TOKENS))
    assert torch.equal(from_scheduler({**FLUX, "even_sigmas": False}, 8, tokens=TOKENS).times, scheduler.timesteps)


def test_noise_is_mixed_as_diffusers_mixes_it_and_the_velocity_leads_back() -> None:
    process, oracle = from_scheduler(SD3, 10), euler(SD3, 10)
    clean, noise = draw(0, 2)
    time = process.times[[0, 6]]
    x, target = process.noised(clean, noise, time)
    torch.testing.assert_close(x, oracle.scale_noise(clean, time, noise))
    assert torch.equal(target, noise - clean)
    torch.testing.assert_close(process.to_epsilon(target, x, time), noise)
    for step in range(10):
        x, target = process.noised(clean, noise, process.times[step].expand(2))
        x0, epsilon = process.split(target, x, step)
        torch.testing.assert_close(x0, clean, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(epsilon, noise, atol=2e-6, rtol=1e-5)


def sigmas(process: Process) -> list[float]:
    return [*(process.times.double() / 1000).tolist(), 0.0]


@every_grid
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_noisy_steps_are_those_of_the_coefficient_preserving_sampler(config: dict, eta: float) -> None:
    """Flow-CPS (arXiv 2509.05952): `(1 - u) x0^ + u cos(level pi / 2) e^ + u sin(level pi / 2) noise`."""
    process = from_scheduler(config, 8, eta, tokens=TOKENS)
    for step, (t, u) in enumerate(zip(sigmas(process), sigmas(process)[1:], strict=False)):
        x, velocity, noise = draw(step, 3)
        turned = eta**2 * (1 - ((1 - t) * u / ((1 - u) * t)) ** 2) if step < 7 else 0.0  # sin^2 of the level's angle
        expected = (1 - u) * (x - t * velocity) + u * math.sqrt(1 - turned) * (x + (1 - t) * velocity) + u * math.sqrt(turned) * noise
        torch.testing.assert_close(process.kernel(velocity, x, step).sample(noise), expected, atol=2e-6, rtol=1e-5)
        assert 0 < turned <= 1 or step == 7


def spread(process: Process, mean: float, deviation: float, exact: bool) -> None:
    """Walks mean and variance of data N(mean, deviation^2), whose best velocity is linear in x, hence every kernel's mean too."""
    center, variance = 0.0, 1.0  # at sigma = 1
    for step, (t, u) in enumerate(zip(sigmas(process), sigmas(process)[1:], strict=False)):
        x = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1)
        x0 = mean + (1 - t) * deviation**2 / ((1 - t) ** 2 * deviation**2 + t**2) * (x - (1 - t) * mean)
        kernel = process.kernel((x - x0) / t, x, step)
        low, high = kernel.mean.flatten().tolist()
        slope, middle = (high - low) / 2, (high + low) / 2
        center, variance = middle + slope * center, slope**2 * variance + kernel.std**2
        if exact:
            assert (center, variance) == pytest.approx(((1 - u) * mean, u**2), abs=1e-5)
    assert center == pytest.approx(mean, rel=0.02)
    assert math.sqrt(variance) == pytest.approx(deviation, rel=0.02, abs=1e-5)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_marginals_are_those_of_the_flow(eta: float) -> None:
    """Of one picture exactly, in any number of steps; of a Gaussian of pictures as the steps grow many."""
    for config in (SD3, FLUX):
        spread(from_scheduler(config, 5, eta, tokens=TOKENS), 0.7, 0.0, exact=True)
        spread(from_scheduler(config, 400, eta, tokens=TOKENS), 0.7, 0.5, exact=False)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' scheduler, at numpy 2
@pytest.mark.parametrize("steps", [4, 14, 15, 28])
def test_steps_of_second_order_are_those_of_diffusers(steps: int) -> None:
    process = from_scheduler(SD3, steps, 0.0, "dpm++2m")
    oracle = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0, algorithm_type="dpmsolver++", solver_order=2)
    oracle.set_timesteps(steps)
    oracle.sigmas = torch.tensor(sigmas(process), dtype=torch.float32)  # its own grid is another
    x, before = draw(1000, 1)[0], None
    theirs = x
    for step, time in enumerate(oracle.timesteps):
        output = draw(step, 1)[0]
        theirs = oracle.step(output, time, theirs).prev_sample
        x, before = process.advance(output, x, step, before)
        torch.testing.assert_close(x, theirs, atol=2e-5, rtol=2e-4)
    # The first step starts from noise alone, so the second has nothing to compare it with; the last ends without noise.
    assert [step for step, constants in enumerate(process.steps) if constants.momentum == 0] == [0, 1, steps - 1]


@pytest.mark.parametrize("config, expected", [(FLUX, (0.149, 0.062)), (SD3, (0.219, 0.283))], ids=["flux", "sd3"])
def test_second_order_comes_nearer_to_the_exact_solution_but_on_the_grid_of_stable_diffusion_3(config: dict, expected: tuple[float, float]) -> None:
    """Data N(m, c^2): the exact solution keeps (x - a m) / sqrt(a^2 c^2 + s^2). The numbers are those of docs/method.md.

    SD3's grid ends in a leap, from sigma = 0.17 to 0.009 here, before which the last two x0^ are no guide.
    """
    mean, deviation, x = 0.5, 0.3, draw(3, 1)[0]
    errors = []
    for solver in ("ddim", "dpm++2m"):
        process, before, state = from_scheduler(config, 16, 0.0, solver, tokens=TOKENS), None, x
        for step, t in enumerate(sigmas(process)[:-1]):
            x0 = mean + (1 - t) * deviation**2 / ((1 - t) ** 2 * deviation**2 + t**2) * (state - (1 - t) * mean)
            state, before = process.advance((state - x0) / t, state, step, before)
        errors.append(float((state - (mean + deviation * x)).abs().max()))
    assert errors == pytest.approx(expected, abs=1e-3)


@every_grid
def test_training_times_lie_where_the_sampler_walks(config: dict) -> None:
    process = from_scheduler(config, 10, tokens=TOKENS)
    shares = [process.share_of(time) for time in process.times.tolist()]
    torch.testing.assert_close(process.time_at(torch.tensor(shares)), process.times, atol=1e-2, rtol=1e-5)
    gaps = [before - after for before, after in pairwise(shares)]
    assert shares[0] == 1 and max(gaps) - min(gaps) < 1e-5
    drawn = process.time_at(torch.linspace(0, 1, 11))
    assert drawn.dtype == process.times.dtype == torch.float32
    assert drawn[0] == 0 and drawn[-1] == 1000


def test_guidance_acts_in_its_range_of_the_schedule_not_of_sigma() -> None:
    process = from_scheduler(FLUX, 10, guidance_range=(0.2, 0.7), tokens=TOKENS)
    assert [process.guides(step) for step in range(10)] == [False] * 3 + [True] * 6 + [False]


@pytest.mark.parametrize("shift", [1.32, 1.57, 1.83])
def test_a_shift_that_rounds_up_starts_at_the_top(shift: float) -> None:
    assert float(from_scheduler({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": shift}, 10).times[0]) == 1000


def test_a_larger_picture_has_a_larger_shift() -> None:
    assert tokens_in((16, 128, 96), 2) == 64 * 48
    small, large = (from_scheduler(FLUX, 4, tokens=tokens_in((16, side, side), 2)) for side in (32, 128))
    assert (large.times[1:] > small.times[1:]).all()
    assert large.schedule.shift == pytest.approx(math.exp(1.15)) and small.schedule.shift == pytest.approx(math.exp(0.5))


@every_grid
def test_sensitivity_is_the_derivative_of_the_mean_over_std_from_the_first_step_on(config: dict) -> None:
    process = from_scheduler(config, 10, eta=0.7, tokens=TOKENS)
    x, output = draw(0, 2)
    assert process.stochastic_steps == tuple(range(9))
    for step in process.stochastic_steps:
        slope = process.kernel(output + 1, x, step).mean - process.kernel(output, x, step).mean
        expected = torch.full(SHAPE, process.sensitivity(step) * process.steps[step].std)
        torch.testing.assert_close(slope.abs(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("config, steps, expected", [
    (SD3, 10, (0.04, 0.25, 1.08, 30.85)),  # the last lands on sigma = 0.009: this is what `drop_last` leaves out
    (SD3, 28, (0.01, 0.14, 1.39, 12.28)),
    (FLUX, 10, (0.04, 0.19, 0.59, 1.13)),
])  # fmt: skip
def test_sensitivity_grows_to_the_end(config: dict, steps: int, expected: tuple[float, ...]) -> None:
    """The numbers of docs/method.md: the first, the middle and the last two noisy steps."""
    process = from_scheduler(config, steps, eta=1.0, tokens=4096)
    profile = [process.sensitivity(step) for step in process.stochastic_steps]
    assert profile == sorted(profile)
    assert (profile[0], profile[len(profile) // 2], profile[-2], profile[-1]) == pytest.approx(expected, abs=0.006)


@pytest.mark.parametrize("step", [0, 4, 8])
def test_the_ratio_before_an_update_is_exactly_one(step: int) -> None:
    process = dataclasses.replace(from_scheduler(SD3, 10, eta=1.0), window=(step,))
    assert process.stochastic_steps == (step,)
    output, x, noise = draw(step, 3)
    sampled, trained = process.kernel(output, x, step), process.kernel(output.clone().requires_grad_(), x, step)
    x_next = sampled.sample(noise)
    assert torch.equal(trained.log_prob(x_next), sampled.log_prob(x_next))
    assert sampled.log_prob(x_next).isfinite().all()


@pytest.mark.parametrize("config, message", [
    (FLUX, "image tokens"),
    ({**SD3, "invert_sigmas": True}, "invert_sigmas"),
    ({**SD3, "use_karras_sigmas": True}, "use_karras_sigmas"),
    ({"_class_name": "LCMScheduler"}, "LCMScheduler .* beta_schedule.* FlowMatch"),
])  # fmt: skip
def test_what_is_no_such_flow_is_refused_with_a_sentence(config: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_scheduler(config, 10)
