"""The exponential average of the weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from safediffusion.train.average import Average


def parameter(value: float = 1.0) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.full((3,), value))


def moved(average: Average, weight: torch.nn.Parameter, *values: float) -> None:
    for value in values:
        with torch.no_grad():
            weight.fill_(value)
        average.update()


def test_it_warms_up_and_then_decays_as_asked() -> None:
    weight = parameter(0.0)
    average = Average([weight], decay=0.15)
    moved(average, weight, 1.0, 2.0)
    expected = torch.tensor(0.1 * 0 + 0.9 * 1.0)  # (1 + 0) / (10 + 0)
    expected = 0.15 * expected + 0.85 * 2.0  # (1 + 1) / (10 + 1) is already more than 0.15
    torch.testing.assert_close(average.state()["0"], expected.expand(3))


def test_weights_are_the_average_inside_only() -> None:
    weight = parameter()
    average = Average([weight], 0.9)
    moved(average, weight, 5.0)
    mean = average.state()["0"].clone()
    with pytest.raises(KeyError), average.applied():
        assert torch.equal(weight.detach(), mean)
        raise KeyError
    assert weight.detach().tolist() == [5.0] * 3
    assert torch.equal(average.state()["0"], mean)


def test_it_goes_on_from_its_state() -> None:
    def end(interrupted: bool) -> Tensor:
        weight = parameter()
        average = Average([weight], 0.9)
        moved(average, weight, 2.0, 3.0)
        if interrupted:
            state = {name: tensor.clone() for name, tensor in average.state().items()}
            average = Average([weight], 0.9)
            average.load(state)
        moved(average, weight, 4.0)
        return average.state()["0"]

    assert torch.equal(end(interrupted=True), end(interrupted=False))


def test_without_decay_it_is_the_weights_themselves() -> None:
    weight = parameter()
    average = Average([weight], 0.0)
    moved(average, weight, 7.0)
    assert average.state() == {}
    average.load({})
    with average.applied():
        assert weight.detach().tolist() == [7.0] * 3
