"""What is exported lies in the precision of what it was trained from."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

from safediffusion import weights
from safediffusion.policies.latent import LatentPolicy, PolicySettings, load_policy
from safediffusion.policies.precision import round_to

WEIGHTS = Path("transformer") / "diffusion_pytorch_model.safetensors"


@pytest.fixture
def halved(folder_of: Callable[[str], Path], tmp_path: Path) -> Path:
    """A Stable Diffusion 3 whose transformer lies there in bfloat16, and all else in float32."""
    folder = Path(shutil.copytree(folder_of("sd3"), tmp_path / "halved"))
    SD3Transformer2DModel.from_pretrained(folder / "transformer").to(torch.bfloat16).save_pretrained(folder / "transformer")
    return folder


def trained(folder: Path, train: str, much: float) -> LatentPolicy:
    policy, generator = load_policy(folder, PolicySettings(train=train)), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in policy.parameters():
            weight += much * torch.randn(weight.shape, generator=generator)
    return policy


@pytest.mark.parametrize("train", ["lora", "full"])
def test_a_saved_model_has_the_precision_of_its_source(halved: Path, tmp_path: Path, train: str) -> None:
    policy = trained(halved, train, 0.1)
    policy.save_pipeline(tmp_path / "saved")
    policy.save_pipeline(tmp_path / "exact", "float32")
    saved, exact, source = (weights.load(folder / WEIGHTS)[0] for folder in (tmp_path / "saved", tmp_path / "exact", halved))
    assert {weight.dtype for weight in saved.values()} == {torch.bfloat16}
    assert {weight.dtype for weight in exact.values()} == {torch.float32}
    assert all(torch.equal(saved[name], exact[name].bfloat16()) for name in exact)
    assert any(not torch.equal(saved[name], source[name]) for name in source)
    for path in (path for path in halved.rglob("*") if path.is_file() and path.parent.name != "transformer"):
        assert (tmp_path / "saved" / path.relative_to(halved)).read_bytes() == path.read_bytes()
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(weight, saved[name].to(weight)) for name, weight in pipeline.transformer.state_dict().items())


def test_a_change_that_rounding_takes_is_said(halved: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"rounding takes \d+% of what training changed in the transformer; export it with --dtype float32"):
        trained(halved, "full", 1e-6).save_pipeline(tmp_path / "saved", "bfloat16")
    load_policy(halved, PolicySettings()).save_pipeline(tmp_path / "saved", "bfloat16")  # nothing was changed


def test_a_change_that_the_precision_of_the_source_would_take_is_kept(halved: Path, tmp_path: Path) -> None:
    policy = trained(halved, "full", 1e-6)
    policy.save_pipeline(tmp_path / "saved")
    saved = weights.load(tmp_path / "saved" / WEIGHTS)[0]
    assert {weight.dtype for weight in saved.values()} == {torch.float32}
    assert all(torch.equal(saved[name], weight) for name, weight in policy.state().items())


def test_weights_that_were_not_trained_have_nothing_to_lose(tmp_path: Path) -> None:
    network, file = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)), tmp_path / "network.safetensors"
    weights.save(file, {name: weight.detach().clone() for name, weight in network.state_dict().items()})
    with torch.no_grad():
        network[0].weight += 1e-2
        moved, exact = 1e-2 * 64, network[0].weight.clone()
        rounding = (exact.bfloat16().float() - exact).norm().item()
    assert round_to(network, [file], torch.bfloat16) == pytest.approx(rounding / moved, rel=1e-3)


def test_each_weight_is_rounded_to_its_own_precision(tmp_path: Path) -> None:
    layer, file = torch.nn.Linear(64, 64), tmp_path / "layer.safetensors"
    weights.save(file, {"weight": layer.weight.half(), "bias": layer.bias})
    learned = torch.nn.Linear(64, 64)
    learned.load_state_dict({"weight": layer.weight.half().float() + 2e-5, "bias": layer.bias})
    lost = round_to(learned, [file])
    assert (learned.weight.dtype, learned.bias.dtype) == (torch.float16, torch.float32)
    assert 0.5 < lost < 2
    assert round_to(learned, [file]) == 0
    assert round_to(learned, [file], torch.bfloat16) > 0
    assert learned.bias.dtype == torch.bfloat16
