"""Stable Diffusion XL and 2.x as policies against diffusers' own pipelines on the same folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from safediffusion.cli.app import main
from safediffusion.errors import UserError
from safediffusion.policies.latent import LatentPolicy, PolicySettings, load_policy
from safediffusion.process import from_scheduler
from safediffusion.rollout import walk

NAMES = ["sd21", "sdxl", "sdxl-v"]
TEXTS = ["a red cat", "a blue dog in a kitchen"]
TIME = torch.tensor([981, 20])
LORA, FULL = PolicySettings(lora_rank=4, lora_alpha=8.0), PolicySettings(train="full")


def load(folder: Path) -> Any:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    kind = StableDiffusionXLPipeline if (folder / "text_encoder_2").is_dir() else StableDiffusionPipeline
    pipeline = kind.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def paint(pipeline: Any, latents: Tensor, steps: int, guidance: float, output: str = "latent") -> Tensor:
    """Clean latents, or pictures, of TEXTS from these initial latents, by diffusers."""
    height, width = (4 * side for side in latents.shape[-2:])
    return pipeline(TEXTS, latents=latents, num_inference_steps=steps, guidance_scale=guidance, output_type=output, height=height, width=width).images


@pytest.fixture(scope="module", params=NAMES)
def folder(request: pytest.FixtureRequest, diffusing: Callable[[str], Path]) -> Path:
    return diffusing(request.param)


@pytest.fixture(scope="module")
def latents() -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def predict(policy: LatentPolicy, latents: Tensor, guidance: float = 1.0) -> Tensor:
    with torch.no_grad():
        return policy.predict(latents, TIME, policy.encode(TEXTS), guidance)


def painted(policy: LatentPolicy, latents: Tensor, steps: int, guidance: float) -> Tensor:
    return walk(policy, from_scheduler(policy.scheduler_config, steps, eta=0.0), policy.encode(TEXTS), latents, guidance).clean


def train_a_step(policy: LatentPolicy, latents: Tensor) -> None:
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    for _ in range(2):  # the first step moves only one of the two LoRA matrices
        policy.predict(latents, TIME, policy.encode(TEXTS)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def apart(one: Tensor, other: Tensor) -> float:
    """The largest difference, as a share of the largest number: latents of an untrained UNet reach 10."""
    return ((one - other).abs().max() / other.abs().max()).item()


def test_deterministic_sampler_is_that_of_the_pipeline(folder: Path, latents: Tensor) -> None:
    policy, pipeline = load_policy(folder, LORA), load(folder)
    for guidance in (1.0, 4.0):
        clean = painted(policy, latents, 5, guidance)
        assert apart(clean, paint(pipeline, latents, 5, guidance)) < 1e-5
        assert apart(clean, latents) > 0.1
    with torch.no_grad():
        assert apart(policy.decode(clean), paint(pipeline, latents, 5, 4.0, "pt")) < 1e-5


def test_another_size_is_told_to_the_network(diffusing: Callable[[str], Path], latents: Tensor) -> None:
    folder = diffusing("sdxl")
    policy, large = load_policy(folder, PolicySettings(image_size=48)), torch.randn(2, 4, 12, 12)
    assert policy.sample_shape == (4, 12, 12)
    assert apart(painted(policy, large, 3, 4.0), paint(load(folder), large, 3, 4.0)) < 1e-5
    sizes = []
    policy.network.register_forward_pre_hook(lambda module, inputs, options: sizes.append(options["added_cond_kwargs"]["time_ids"]), with_kwargs=True)
    predict(policy, large[:, :, :8])
    assert sizes[0].tolist() == [[32, 48, 0, 0, 32, 48]] * 2


def test_the_empty_prompt_is_zeros_only_where_nothing_was_asked(diffusing: Callable[[str], Path]) -> None:
    zeros, encoded = (load_policy(diffusing(name), LORA).encode for name in ("sdxl", "sdxl-v"))
    assert not zeros.unconditional.any()
    assert torch.equal(encoded.unconditional, encoded([""]))
    assert zeros([""]).any()
    assert zeros([""]).shape == (1, 24 + 1, 96)


@pytest.mark.parametrize("settings", [FULL, LORA], ids=["full", "lora"])
def test_saved_models_paint_the_same_in_diffusers(folder: Path, settings: PolicySettings, latents: Tensor, tmp_path: Path) -> None:
    policy = load_policy(folder, settings)
    before = predict(policy, latents)
    train_a_step(policy, latents)
    assert apart(predict(policy, latents), before) > 1e-3
    with policy.reference():
        assert torch.equal(predict(policy, latents), before)
    ours = painted(policy, latents, 3, 4.0)
    policy.save_pipeline(tmp_path / "saved")
    assert apart(paint(load(tmp_path / "saved"), latents, 3, 4.0), ours) < 1e-4
    if settings.train == "lora":
        policy.save_lora(tmp_path / "lora")
        pipeline = load(folder)
        pipeline.load_lora_weights(tmp_path / "lora")
        assert apart(paint(pipeline, latents, 3, 4.0), ours) < 1e-4


def test_bfloat16_and_checkpointing_leave_the_reference_exact(diffusing: Callable[[str], Path], latents: Tensor) -> None:
    exact = predict(load_policy(diffusing("sdxl"), LORA), latents)
    policy = load_policy(diffusing("sdxl"), PolicySettings(dtype="bfloat16", gradient_checkpointing=True))
    rough = predict(policy, latents)
    assert 0 < apart(rough, exact) < 0.1
    train_a_step(policy, latents)
    assert not torch.equal(predict(policy, latents), rough)
    with policy.reference():
        assert torch.equal(predict(policy, latents), rough)


@pytest.mark.parametrize(
    ("part", "changes", "sentence"),
    [
        ("unet", {"in_channels": 9}, "mismatched weights, such as conv_in.weight"),
        ("text_encoder_2", {"projection_dim": 24}, "mismatched weights, such as text_projection.weight"),
        ("text_encoder_2", {"vocab_size": 10}, "mismatched weights"),
        ("vae", {"latents_mean": [0.1, 0.2, 0.3, 0.4]}, "scales each channel of a latent by itself"),
    ],
)
def test_folder_that_contradicts_itself(diffusing: Callable[[str], Path], tmp_path: Path, part: str, changes: dict[str, Any], sentence: str) -> None:
    copy = Path(shutil.copytree(diffusing("sdxl"), tmp_path / "copy"))
    config = json.loads((copy / part / "config.json").read_text())
    (copy / part / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=sentence):
        load_policy(copy, LORA)


def test_text_encoders_of_another_model(diffusing: Callable[[str], Path], tmp_path: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    copy = Path(shutil.copytree(diffusing("sdxl"), tmp_path / "copy"))
    config = json.loads((copy / "text_encoder_2" / "config.json").read_text())
    CLIPTextModelWithProjection(CLIPTextConfig(**config | {"projection_dim": 24})).save_pretrained(copy / "text_encoder_2")
    with pytest.raises(UserError, match="expects a pooled embedding of width 40, the second text encoder gives 24"):
        load_policy(copy, LORA)
    config = json.loads((copy / "text_encoder" / "config.json").read_text())
    CLIPTextModel(CLIPTextConfig(**config | {"hidden_size": 64})).save_pretrained(copy / "text_encoder")
    with pytest.raises(UserError, match="expects a condition of width 96, the two text encoders give 128"):
        load_policy(copy, LORA)


RECIPE = """
model = "MODEL"
steps = 1
[policy]
lora_rank = 2
[process]
steps = 3
guidance = 2.0
eta = ETA
[reward]
kind = "similarity"
encoder = "pictograms"
[algorithm]
ALGORITHM
prompts = 2
group = 2
[probe]
every = 0
"""
ALGORITHMS = {"grpo": 'kind = "grpo"\nwindow.length = 1', "forward": 'kind = "forward"\ntimes = 2'}


@pytest.mark.parametrize("kind", ALGORITHMS)
def test_the_ordinary_command_trains_it(diffusing: Callable[[str], Path], kind: str, tmp_path: Path) -> None:
    recipe, run = tmp_path / "recipe.toml", tmp_path / "run"
    recipe.write_text(RECIPE.replace("MODEL", str(diffusing("sdxl"))).replace("ALGORITHM", ALGORITHMS[kind]).replace("ETA", str(float(kind == "grpo"))))
    assert main(["train", str(recipe), "--out", str(run)]) == 0
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["grad_norm"] > 0
    base, trained = (load(each).unet.state_dict() for each in (diffusing("sdxl"), run / "model"))
    assert any(not torch.equal(base[name], trained[name]) for name in base)
