"""A base in few bits, with the real packages where they are installed: near the exact one, its own reference, exported exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from safediffusion import build
from safediffusion.config import resolve
from safediffusion.cost.pace import measure_pace
from safediffusion.cost.shapes import measure_shapes
from safediffusion.errors import UserError
from safediffusion.policies import quantise
from safediffusion.policies.latent import PolicySettings, load_policy
from safediffusion.policies.variant import AS_IT_IS
from safediffusion.process.settings import ProcessSettings
from safediffusion.recipe import Recipe, check

PACKAGES = {"int8": "torchao", "nf4": "bitsandbytes"}
TABLE = {"model": "pictograms", "steps": 1, "reward": {"kind": "similarity", "encoder": "pictograms"}}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning:torchao", "ignore::FutureWarning")


@pytest.mark.parametrize(("kind", "error", "model"), [("int8", 0.02, ""), ("nf4", 0.2, "sd3")])
def test_a_base_in_few_bits(tiny_pipeline: Path, folder_of: Callable[[str], Path], tmp_path: Path, kind: str, error: float, model: str) -> None:
    pytest.importorskip(PACKAGES[kind])
    folder = folder_of(model) if model else tiny_pipeline
    exact, few = (load_policy(folder, PolicySettings(dtype="bfloat16", lora_rank=4, quantise=each)) for each in ("none", kind))
    x, time, condition = torch.randn(2, *few.sample_shape, generator=torch.Generator().manual_seed(0)), torch.tensor(500), few.encode(["a cat", "a dog"])
    output = few.predict(x, time, condition)
    with few.reference():
        assert torch.equal(few.predict(x, time, condition), output)  # adapters add exactly nothing yet
    with torch.no_grad():
        wanted = exact.predict(x, time, condition)
    assert 0 < (output - wanted).norm() / wanted.norm() < error

    output.square().mean().backward()
    exact.predict(x, time, condition).square().mean().backward()
    gradient, true = (torch.cat([weight.grad.flatten() for weight in policy.parameters() if weight.grad is not None]) for policy in (few, exact))
    assert torch.nn.functional.cosine_similarity(gradient, true, 0) > 0.9
    assert {name: value.dtype for name, value in few.state().items()} == dict.fromkeys(exact.state(), torch.float32)

    few.load_state({name: value + 0.1 for name, value in few.state().items()})
    few.save_pipeline(tmp_path / "few")
    exact.load_state(few.state())
    exact.save_pipeline(tmp_path / "exact")
    (saved,), (same,) = ((tmp_path / which / few.family.network).glob("*.safetensors") for which in ("few", "exact"))
    assert saved.read_bytes() == same.read_bytes()
    assert measure_pace(few, build.process(few, ProcessSettings(steps=2)), 1).trained > 0


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_model_in_few_bits_only_paints(tiny_pipeline: Path, kind: str) -> None:
    pytest.importorskip(PACKAGES[kind])
    few, exact = (load_policy(tiny_pipeline, replace(AS_IT_IS, quantise=each)) for each in (kind, "none"))
    x, condition = torch.randn(2, *few.sample_shape, generator=torch.Generator().manual_seed(0)), few.encode(["a cat", "a dog"])
    with torch.no_grad():
        output, wanted = (policy.predict(x, torch.tensor(500), condition, 3.0) for policy in (few, exact))
    assert few.parameters() == []
    assert 0 < (output - wanted).norm() / wanted.norm() < 0.5


def test_few_bits_are_little_memory(tiny_pipeline: Path) -> None:
    half, eight, four = (measure_shapes(tiny_pipeline, PolicySettings(dtype="bfloat16", quantise=kind)).weights for kind in ("none", "int8", "nf4"))
    assert four < eight < half


def test_what_cannot_be_quantised_is_said_before_anything_is_read(tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match='train = "full" freezes none'):
        check(resolve(Recipe, {**TABLE, "policy": {"quantise": "nf4", "train": "full"}}))
    monkeypatch.setattr(quantise.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs torchao, which is not installed; run: pip install"):
        load_policy(tiny_pipeline, PolicySettings(quantise="int8"))
