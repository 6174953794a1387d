"""The training loop: resumed equals uninterrupted, to the last bit."""

import pytest
import torch
from torch import nn

from safediffusion.tiny.fit import fit, learning_rate


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))


def train(folder, net, dies_at=None, steps=10, **options):
    calls = []

    def loss(generator):
        if len(calls) == dies_at:
            raise KeyboardInterrupt
        calls.append(1)
        x = torch.randn(16, 6, generator=generator)
        return (net(x)[:, 0] - x.sum(1)).square().mean()

    fit("net", net, loss, folder, steps=steps, peak=1e-2, seed=3, ema=0.9, checkpoint_every=3, **options)
    return net, len(calls)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.fixture
def whole(tmp_path):
    return train(tmp_path / "whole", network())[0]


@pytest.mark.parametrize("dies_at", [0, 2, 3, 7, 9])
def test_a_killed_training_goes_on_as_if_nothing_had_happened(tmp_path, whole, dies_at):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, network(), dies_at)
    torch.manual_seed(123)
    resumed, steps = train(tmp_path, network())
    assert same(resumed, whole) and steps == 10 - dies_at // 3 * 3


def test_a_finished_training_is_not_repeated(tmp_path, whole):
    again, steps = train(tmp_path / "whole", network())
    assert steps == 0 and same(again, whole)


@pytest.mark.parametrize("cut", [0, 8, 400])
def test_a_corrupt_checkpoint_costs_the_training_and_says_so(tmp_path, whole, cut):
    path = tmp_path / "whole" / "net.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.warns(UserWarning, match="net.safetensors .*starts over"):
        again, steps = train(tmp_path / "whole", network())
    assert steps == 10 and same(again, whole)


def test_what_remains_is_the_average(tmp_path, whole):
    net = network()
    fit("net", net, lambda g: net(torch.randn(16, 6, generator=g)).square().mean(), tmp_path / "plain", steps=10, peak=1e-2, seed=3)
    plain, _ = train(tmp_path / "other", network(), rate=lambda step: 0.0)
    assert same(plain, network())  # a rate of 0 moves nothing
    assert not same(net, whole)


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path):
    net = network()
    with pytest.raises(FloatingPointError, match="'net' is not finite"):
        fit("net", net, lambda _: net(torch.full((1, 6), torch.nan)).sum(), tmp_path, steps=60, peak=1e-2, seed=0)


def test_the_rate_warms_up_and_falls():
    rates = [learning_rate(step, 1000, 1.0) for step in range(1000)]
    assert rates[0] == pytest.approx(1 / 200) and max(rates) == rates[200] == 1.0
    assert rates[-1] == pytest.approx(0.02, abs=1e-3) and rates[200:] == sorted(rates[200:], reverse=True)
