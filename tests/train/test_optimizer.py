import copy
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from safediffusion import weights
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


class Nested(torch.optim.Optimizer):
    """Momentum whose state is kept as bitsandbytes keeps its own: numbers, and tensors in a dict, one of them shared by all parameters."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.table = torch.linspace(0.5, 1.5, 5)

    @torch.no_grad()
    def step(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            if not state:
                state |= {"step": 0, "decay": 0.1, "warm": True, "moment": {"sum": torch.zeros_like(parameter), "scale": {"table": self.table}}}
            state["step"] += 1
            state["moment"]["sum"].mul_(state["decay"]).add_(parameter.grad)
            parameter.sub_(state["moment"]["sum"] * state["moment"]["scale"]["table"].mean() / state["step"])


def walked(optimizer: torch.optim.Optimizer, parameters: Sequence[torch.nn.Parameter], steps: int) -> None:
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = parameter.detach().sin()
        optimizer.step()


def check_resumed(build: Callable[[Sequence[torch.nn.Parameter]], torch.optim.Optimizer], path: Path) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Four steps and two steps, a file and two steps end alike to the last bit; the optimizers of both."""
    torch.manual_seed(0)
    whole = [torch.nn.Parameter(torch.randn(64, 128)) for _ in range(2)]
    before = build(whole)
    walked(before, whole, 2)
    weights.save(path, weights.optimizer_tensors(before))
    broken = copy.deepcopy(whole)
    after = build(broken)
    weights.load_optimizer(after, weights.load(path)[0])
    for optimizer, parameters in ((before, whole), (after, broken)):
        walked(optimizer, parameters, 2)
    assert all(torch.equal(one, other) for one, other in zip(whole, broken, strict=True))
    return before, after


def test_a_state_that_nests_and_shares_is_kept(tmp_path: Path) -> None:
    before, after = check_resumed(Nested, tmp_path / "state.safetensors")
    one, other = before.state_dict()["state"][1], after.state_dict()["state"][1]
    assert {name: (type(value), value) for name, value in other.items() if name != "moment"} == {"step": (int, 4), "decay": (float, 0.1), "warm": (bool, True)}
    assert torch.equal(other["moment"]["sum"], one["moment"]["sum"])
    assert torch.equal(other["moment"]["scale"]["table"], one["moment"]["scale"]["table"])


def test_the_state_of_adamw_has_the_names_it_always_had(tmp_path: Path) -> None:
    before, _ = check_resumed(lambda parameters: build_optimizer(parameters, OptimizerSettings()), tmp_path / "state.safetensors")
    assert set(weights.optimizer_tensors(before)) == {f"{i}.{name}" for i in range(2) for name in ("step", "exp_avg", "exp_avg_sq")}


def test_the_state_of_eight_bits_is_kept(tmp_path: Path) -> None:
    library = pytest.importorskip("bitsandbytes")
    before, after = check_resumed(lambda parameters: library.optim.AdamW8bit(parameters, lr=1e-3), tmp_path / "state.safetensors")
    one, other = ([*optimizer.state.values()][1] for optimizer in (before, after))
    assert one["state1"].dtype == other["state1"].dtype == torch.uint8
    assert type(other["step"]) is int
    assert one.keys() == other.keys()
