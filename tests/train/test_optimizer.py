import importlib.util

import pytest
import torch

from safediffusion.errors import UserError
from safediffusion.train.optimizer import OptimizerSettings, build_optimizer, rate


def test_a_constant_rate_stays() -> None:
    options = OptimizerSettings(lr=1e-3)
    assert {rate(options, step, 5) for step in range(5)} == {1e-3}


def test_a_linear_rate_falls_evenly_to_a_tenth() -> None:
    options = OptimizerSettings(lr=1e-3, schedule="linear")
    assert [rate(options, step, 4) for step in range(4)] == pytest.approx([1e-3, 7e-4, 4e-4, 1e-4])
    assert rate(options, 0, 1) == 1e-3


@pytest.mark.skipif(torch.cuda.is_available() and importlib.util.find_spec("bitsandbytes") is not None, reason="it can be had here")
def test_eight_bits_that_cannot_be_had_are_refused() -> None:
    with pytest.raises(UserError, match="optimizer.eight_bit needs (bitsandbytes; run: pip install|a GPU)"):
        build_optimizer([torch.nn.Parameter(torch.zeros(1))], OptimizerSettings(eight_bit=True))
