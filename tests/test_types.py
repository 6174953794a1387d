"""The kernel against torch.distributions."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from safediffusion.types import Kernel

SHAPE = (3, 4, 8, 8)


def drawn(seed):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("std", [0.02, 0.3, 2.0])
def test_log_prob_is_a_sum_of_normals(std):
    mean, x_next = drawn(0), drawn(1)
    expected = Normal(mean, std).log_prob(x_next).sum((1, 2, 3))
    torch.testing.assert_close(Kernel(mean, std).log_prob(x_next), expected)


def test_log_prob_takes_half_precision_samples_in_float32():
    x_next = drawn(1).bfloat16()
    log_prob = Kernel(drawn(0), 0.3).log_prob(x_next)
    assert log_prob.dtype == torch.float32
    assert torch.equal(log_prob, Kernel(drawn(0), 0.3).log_prob(x_next.float()))


def test_log_prob_pulls_the_mean_towards_the_sample():
    mean, x_next = drawn(0).requires_grad_(), drawn(1)
    Kernel(mean, 0.5).log_prob(x_next).sum().backward()
    torch.testing.assert_close(mean.grad, (x_next - mean.detach()) / 0.25)


@pytest.mark.parametrize("std", [0.02, 0.3, 2.0])
def test_kl_is_the_sum_of_normal_kls(std):
    mean, other = drawn(0), drawn(1)
    expected = kl_divergence(Normal(mean, std), Normal(other, std)).sum((1, 2, 3))
    torch.testing.assert_close(Kernel(mean, std).kl(Kernel(other, std)), expected)


def test_kl_to_itself_is_zero():
    kernel = Kernel(drawn(0), 0.3)
    assert torch.equal(kernel.kl(kernel), torch.zeros(3))


def test_samples_have_the_mean_and_std():
    noise = torch.randn(100_000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    sample = Kernel(torch.full_like(noise, 2.0), 0.3).sample(noise)
    assert abs(sample.mean().item() - 2.0) < 0.005
    assert abs(sample.std().item() - 0.3) < 0.005


def test_a_deterministic_step_is_its_mean_and_has_no_density():
    kernel = Kernel(drawn(0), 0.0)
    assert torch.equal(kernel.sample(drawn(1)), kernel.mean)
    with pytest.raises(ValueError, match="eta > 0"):
        kernel.log_prob(kernel.mean)
    with pytest.raises(ValueError, match="not finite"):
        kernel.kl(kernel)
