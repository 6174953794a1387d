"""What is particular to Stable Diffusion XL: two text encoders, the size as an input, zeros for the empty prompt."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from safediffusion.errors import UserError
from safediffusion.guidance.policy import GuidedPolicy
from safediffusion.guidance.sld import SafeLatent, Strength
from safediffusion.policies.latent import PolicySettings, load_policy
from safediffusion.process import from_scheduler

TEXTS = ["a red cat", "a blue dog in a kitchen"]
LORA = PolicySettings(lora_rank=4)


def test_the_size_is_told_to_the_network(folder_of: Callable[[str], Path]) -> None:
    policy, sizes = load_policy(folder_of("sdxl"), LORA), []
    assert policy.sample_shape == (4, 8, 8)
    policy.network.register_forward_pre_hook(lambda module, inputs, options: sizes.append(options["added_cond_kwargs"]["time_ids"]), with_kwargs=True)
    with torch.no_grad():
        policy.predict(torch.randn(2, 4, 8, 12), torch.tensor([981, 20]), policy.encode(TEXTS))
    assert sizes[0].tolist() == [[32, 48, 0, 0, 32, 48]] * 2


def test_the_empty_prompt_is_zeros_only_where_nothing_was_asked(folder_of: Callable[[str], Path]) -> None:
    zeros, encoded = (load_policy(folder_of(name), LORA).encode for name in ("sdxl", "sdxl-v"))
    assert not zeros.unconditional.any()
    assert torch.equal(encoded.unconditional, encoded([""]))
    assert zeros([""]).any()
    assert zeros([""]).shape == (1, 24 + 1, 96)


@pytest.mark.parametrize("name", ["sdxl", "sdxl-v"])
def test_safe_latent_guidance_has_the_same_branch_without_a_prompt(folder_of: Callable[[str], Path], name: str) -> None:
    policy = load_policy(folder_of(name), LORA)
    nothing = GuidedPolicy(policy, SafeLatent(from_scheduler(policy.scheduler_config, 5, eta=0.0), "a knife", Strength(0.0, 1e-20, 1.0, 0.0, 0.0)))
    x, time = torch.randn((2, *policy.sample_shape), generator=torch.Generator().manual_seed(0)), torch.tensor([981, 981])
    with torch.no_grad():
        guided, plain = (each.predict(x, time, each.encode(TEXTS), 7.5) for each in (nothing, policy))
    torch.testing.assert_close(guided, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("part", "changes", "sentence"),
    [
        ("unet", {"in_channels": 9}, "mismatched weights, such as conv_in.weight"),
        ("text_encoder_2", {"projection_dim": 24}, "mismatched weights, such as text_projection.weight"),
        ("text_encoder_2", {"vocab_size": 10}, "mismatched weights"),
        ("vae", {"latents_mean": [0.1, 0.2, 0.3, 0.4]}, "scales each channel of a latent by itself"),
    ],
)
def test_folder_that_contradicts_itself(folder_of: Callable[[str], Path], tmp_path: Path, part: str, changes: dict[str, Any], sentence: str) -> None:
    copy = Path(shutil.copytree(folder_of("sdxl"), tmp_path / "copy"))
    config = json.loads((copy / part / "config.json").read_text())
    (copy / part / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=sentence):
        load_policy(copy, LORA)


def test_text_encoders_of_another_model(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    copy = Path(shutil.copytree(folder_of("sdxl"), tmp_path / "copy"))
    config = json.loads((copy / "text_encoder_2" / "config.json").read_text())
    CLIPTextModelWithProjection(CLIPTextConfig(**config | {"projection_dim": 24})).save_pretrained(copy / "text_encoder_2")
    with pytest.raises(UserError, match="expects a pooled embedding of width 40, the second text encoder gives 24"):
        load_policy(copy, LORA)
    config = json.loads((copy / "text_encoder" / "config.json").read_text())
    CLIPTextModel(CLIPTextConfig(**config | {"hidden_size": 64})).save_pretrained(copy / "text_encoder")
    with pytest.raises(UserError, match="expects a condition of width 96, the two text encoders give 128"):
        load_policy(copy, LORA)
