"""The VP process against diffusers' schedulers, and the properties that training rests on."""

import dataclasses

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from safediffusion.process import from_scheduler

SD1 = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "set_alpha_to_one": False,
}
TYPES = ["epsilon", "v_prediction", "sample"]
ZERO_SNR = {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
SHAPE = (2, 4, 8, 8)

process_of = from_scheduler
prediction_types = st.sampled_from(TYPES)
seeds = st.integers(0, 2**31)
quick = settings(max_examples=25)


def draw(seed, count):
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed)).unbind()


def ddim(config, steps):
    scheduler = DDIMScheduler.from_config(config, clip_sample=False)
    scheduler.set_timesteps(steps)
    return scheduler


def assert_steps_like_ddim(config, steps, eta):
    """At every step; diffusers' last step is asked for eta = 0, because ours is deterministic."""
    process, oracle = process_of(config, steps, eta), ddim(config, steps)
    assert torch.equal(process.times, oracle.timesteps)
    for i, time in enumerate(oracle.timesteps.tolist()):
        x, output, noise = draw(i, 3)
        expected = oracle.step(output, time, x, eta=eta if i < steps - 1 else 0.0, variance_noise=noise)
        ours = process.kernel(output, x, i).sample(noise)
        torch.testing.assert_close(ours, expected.prev_sample, atol=1e-5, rtol=1e-5)
        x0, _ = process.split(output, x, i)
        torch.testing.assert_close(x0, expected.pred_original_sample, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("spacing, steps", [("leading", 50), ("leading", 7), ("leading", 1), ("trailing", 20)])
def test_steps_are_diffusers_ddim_steps(prediction_type, eta, spacing, steps):
    assert_steps_like_ddim({**SD1, "prediction_type": prediction_type, "timestep_spacing": spacing}, steps, eta)


@pytest.mark.parametrize("change, eta", [
    ({"beta_schedule": "linear"}, 1.0),
    ({"beta_schedule": "squaredcos_cap_v2"}, 1.0),
    ({"set_alpha_to_one": True}, 1.0),
    (ZERO_SNR, 0.9),  # at eta = 1 diffusers takes the root of -6e-8, and returns NaN
])  # fmt: skip
def test_every_schedule_is_diffusers_schedule(change, eta):
    assert_steps_like_ddim({**SD1, **change}, 10, eta)


def test_zero_snr_is_finite_at_eta_one():
    process = process_of({**SD1, **ZERO_SNR}, 10, eta=1.0)
    output, x = draw(0, 2)
    assert process.kernel(output, x, 0).mean.isfinite().all()


@pytest.mark.parametrize("spacing, steps", [("linspace", 10), ("trailing", 30)])
def test_uneven_spacing_steps_like_ddpm(spacing, steps):
    """DDIMScheduler jumps M // steps here and misses the next time of its own grid; DDPMScheduler does not."""
    config = {**SD1, "timestep_spacing": spacing}
    oracle = DDPMScheduler.from_config(config, clip_sample=False)
    oracle.set_timesteps(steps)
    process = process_of(config, steps, eta=1.0)
    assert torch.equal(process.times, oracle.timesteps)
    for i in process.stochastic_steps:
        x, output = draw(i, 2)
        expected = oracle.step(output, oracle.timesteps[i], x, generator=torch.Generator().manual_seed(i)).prev_sample
        noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(i))
        torch.testing.assert_close(process.kernel(output, x, i).sample(noise), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_noised_is_diffusers_add_noise_and_get_velocity(prediction_type):
    process, oracle = process_of({**SD1, "prediction_type": prediction_type}, 10), ddim(SD1, 10)
    clean, noise = draw(0, 2)
    time = torch.tensor([3, 871])
    x, target = process.noised(clean, noise, time)
    targets = {"epsilon": noise, "v_prediction": oracle.get_velocity(clean, noise, time), "sample": clean}
    torch.testing.assert_close(x, oracle.add_noise(clean, noise, time))
    torch.testing.assert_close(target, targets[prediction_type])


@quick
@given(prediction_types, st.integers(1, 60), seeds)
def test_the_target_splits_into_what_was_mixed(prediction_type, steps, seed):
    process = process_of({**SD1, "prediction_type": prediction_type}, steps)
    step = seed % steps
    clean, noise = draw(seed, 2)
    x, target = process.noised(clean, noise, process.times[step].expand(len(clean)))
    x0, epsilon = process.split(target, x, step)
    # The loosest cases divide by a_t = 0.07 (epsilon, t near 1000) and by s_t = 0.04 (sample, t = 1).
    torch.testing.assert_close(x0, clean, atol=2e-5, rtol=0)
    torch.testing.assert_close(epsilon, noise, atol=2e-5, rtol=0)


@quick
@given(prediction_types, st.integers(2, 60), seeds)
def test_to_epsilon_is_the_epsilon_of_split_with_a_time_for_each_sample(prediction_type, steps, seed):
    process = process_of({**SD1, "prediction_type": prediction_type}, steps)
    output, x = draw(seed, 2)
    first, second = seed % steps, (seed // steps) % steps
    epsilon = process.to_epsilon(output, x, process.times[[first, second]])
    torch.testing.assert_close(epsilon[0], process.split(output, x, first)[1][0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(epsilon[1], process.split(output, x, second)[1][1], atol=1e-5, rtol=1e-5)


@quick
@given(prediction_types, st.integers(1, 60), st.floats(0.0, 1.0))
def test_a_step_keeps_the_noise_level_of_the_next_time(prediction_type, steps, eta):
    process = process_of({**SD1, "prediction_type": prediction_type}, steps, eta)
    for step in process.steps:
        assert step.signal**2 + step.direction**2 + step.std**2 == pytest.approx(1.0, abs=1e-12)


@quick
@given(prediction_types, st.integers(2, 60), seeds)
def test_the_ratio_before_an_update_is_exactly_one(prediction_type, steps, seed):
    process = process_of({**SD1, "prediction_type": prediction_type}, steps, eta=0.5)
    step = seed % (steps - 1)
    output, x, noise = draw(seed, 3)
    sampled = process.kernel(output, x, step)
    x_next = sampled.sample(noise)
    trained = process.kernel(output.clone().requires_grad_(), x, step)
    assert torch.equal(trained.log_prob(x_next).exp(), sampled.log_prob(x_next).exp())
    assert torch.equal(trained.log_prob(x_next), sampled.log_prob(x_next))


def test_all_steps_but_the_last_are_stochastic_and_none_at_eta_zero():
    assert process_of(SD1, 10, eta=0.3).stochastic_steps == tuple(range(9))
    assert process_of(SD1, 1).stochastic_steps == ()
    deterministic = process_of(SD1, 10, eta=0.0)
    assert deterministic.stochastic_steps == ()
    assert all(step.std == 0 for step in deterministic.steps)


def test_sensitivity_has_the_published_profile_for_sd1():
    process = process_of(SD1, 50)
    by_time = {int(process.times[i]): process.sensitivity(i) for i in process.stochastic_steps}
    assert all(0.37 < value < 0.52 for time, value in by_time.items() if time > 121)
    assert all(0.52 < by_time[time] < 1.02 for time in (121, 101, 81, 61, 41))
    assert by_time[21] == pytest.approx(3.3, abs=0.05)
    typical = sorted(by_time.values())[len(by_time) // 2]
    assert (by_time[21] / typical) ** 2 == pytest.approx(60, abs=5)  # the weight of its KL


@pytest.mark.parametrize("config", [{**SD1, "prediction_type": kind} for kind in TYPES] + [{**SD1, **ZERO_SNR}])
def test_sensitivity_is_the_derivative_of_the_mean_over_std(config):
    process = process_of(config, 10, eta=0.5)
    x, output = draw(0, 2)
    for step in process.stochastic_steps:
        slope = process.kernel(output + 1, x, step).mean - process.kernel(output, x, step).mean
        expected = torch.full(SHAPE, process.sensitivity(step) * process.steps[step].std)
        torch.testing.assert_close(slope.abs(), expected, atol=1e-5, rtol=1e-4)


def test_everything_is_float32_whatever_the_network_computes_in():
    process = process_of(SD1, 10)
    output, x = (tensor.bfloat16() for tensor in draw(0, 2))
    time = torch.tensor([5, 500])
    tensors = [process.kernel(output, x, 0).mean, *process.split(output, x, 0), process.to_epsilon(output, x, time)]
    assert {tensor.dtype for tensor in [*tensors, *process.noised(x, output, time)]} == {torch.float32}


@pytest.mark.parametrize("change, steps, eta, message", [
    ({}, 0, 1.0, "at least 1"),
    ({}, 10, 1.1, "eta"),
    ({}, 10, -0.1, "eta"),
    ({}, 1000, 1.0, "another number of steps"),  # steps_offset carries the first time to 1000
    ({"prediction_type": "flow"}, 10, 1.0, "prediction_type"),
    ({"clip_sample": True}, 10, 1.0, "clip_sample"),
    ({"thresholding": True}, 10, 1.0, "thresholding"),
    ({**ZERO_SNR, "prediction_type": "epsilon"}, 10, 1.0, "no signal"),
])  # fmt: skip
def test_impossible_processes_are_refused_with_a_sentence(change, steps, eta, message):
    with pytest.raises(ValueError, match=message):
        process_of({**SD1, **change}, steps, eta)


def test_a_flow_config_and_the_density_of_the_last_step_are_refused():
    with pytest.raises(ValueError, match="beta_schedule"):
        process_of({"num_train_timesteps": 1000, "shift": 3.0}, 10)
    process = process_of(SD1, 10)
    with pytest.raises(ValueError, match="deterministic"):
        process.sensitivity(9)
    with pytest.raises(ValueError, match="decrease"):
        dataclasses.replace(process, times=process.times.flip(0))
    with pytest.raises(ValueError, match="empty"):
        dataclasses.replace(process, times=process.times[:0])
