"""What is particular to FLUX: packed latents, guidance as an input, T5's states with CLIP's pooled embedding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from torch import Tensor

from safediffusion.errors import UserError
from safediffusion.policies.families import find_family
from safediffusion.policies.latent import PolicySettings, load_policy
from safediffusion.policies.pipeline import load_text
from safediffusion.process import from_scheduler

LORA = PolicySettings(lora_rank=4, image_size=32)
TEXTS = ["a red cat", "a blue dog in a kitchen"]


@pytest.fixture(scope="module")
def pipeline(folder_of: Callable[[str], Path]) -> Any:
    return FluxPipeline.from_pretrained(folder_of("flux-dev"))


@torch.no_grad()
def diffusers_predict(pipeline: Any, latents: Tensor, time: Tensor, guidance: float) -> Tensor:
    states, pooled, text_ids = pipeline.encode_prompt(TEXTS, max_sequence_length=16)
    count, channels, height, width = latents.shape
    output = pipeline.transformer(
        hidden_states=pipeline._pack_latents(latents, count, channels, height, width),
        timestep=time / 1000,
        guidance=torch.full((count,), guidance),
        pooled_projections=pooled,
        encoder_hidden_states=states,
        txt_ids=text_ids,
        img_ids=pipeline._prepare_latent_image_ids(count, height // 2, width // 2, "cpu", torch.float32),
    ).sample
    return pipeline._unpack_latents(output, height * pipeline.vae_scale_factor, width * pipeline.vae_scale_factor, pipeline.vae_scale_factor)


def test_encoding_is_that_of_the_pipeline(folder_of: Callable[[str], Path], pipeline: Any) -> None:
    encode = load_policy(folder_of("flux-dev"), LORA).encode
    for ours, texts in ((encode(TEXTS), TEXTS), (encode.unconditional, [""])):
        with torch.no_grad():
            states, pooled, _ = pipeline.encode_prompt(texts, max_sequence_length=16)
        torch.testing.assert_close(ours[:, :-1], states, rtol=0, atol=1e-6)
        torch.testing.assert_close(ours[:, -1, :32], pooled, rtol=0, atol=1e-6)
        assert not ours[:, -1, 32:].any()


@pytest.mark.parametrize("guidance", [3.5, 1.0])
def test_network_sees_what_the_pipeline_shows_it(folder_of: Callable[[str], Path], pipeline: Any, guidance: float) -> None:
    """Of pictures that are wider than high."""
    policy = load_policy(folder_of("flux-dev"), replace(LORA, embedded_guidance=guidance))
    latents, time = torch.randn(2, 8, 6, 10, generator=torch.Generator().manual_seed(1)), torch.tensor([875.5, 20.25])
    with torch.no_grad():
        ours = policy.predict(latents, time, policy.encode(TEXTS))
    assert (ours - diffusers_predict(pipeline, latents, time, guidance)).abs().max() < 1e-6
    assert (ours - diffusers_predict(pipeline, latents, time, 2.0)).abs().max() > 1e-2


def test_schnell_does_not_hear_of_guidance(folder_of: Callable[[str], Path]) -> None:
    one, other = (load_policy(folder_of("flux-schnell"), replace(LORA, embedded_guidance=guidance)) for guidance in (1.0, 3.5))
    latents, time = torch.randn(2, 8, 8, 8), torch.tensor(500.0)
    with torch.no_grad():
        assert torch.equal(*(policy.predict(latents, time, policy.encode(TEXTS)) for policy in (one, other)))


def test_schnell_walks_evenly(folder_of: Callable[[str], Path]) -> None:
    process = from_scheduler(load_policy(folder_of("flux-schnell"), LORA).scheduler_config, 4)
    assert process.times.tolist() == [1000.0, 750.0, 500.0, 250.0]


def test_pictures_have_the_size_of_the_pipeline_and_whole_patches(folder_of: Callable[[str], Path]) -> None:
    assert load_policy(folder_of("flux-dev"), replace(LORA, image_size=None)).sample_shape == (8, 128, 128)
    with pytest.raises(UserError, match="image_size = 36 is not a multiple of 8"):
        load_policy(folder_of("flux-dev"), replace(LORA, image_size=36))


def test_encoders_that_do_not_fit_are_refused(folder_of: Callable[[str], Path]) -> None:
    family = find_family(folder_of("flux-dev"))
    text = load_text(family, folder_of("flux-dev"))
    assert family.mismatch(text) == ""
    for change, words in (
        ({"joint_attention_dim": 112}, "condition of width 112, T5 gives 104"),
        ({"pooled_projection_dim": 48}, "pooled embedding of width 48, the CLIP text encoder gives 32"),
    ):
        assert words in replace(family, config={**family.config, **change}).mismatch(text)


def test_networks_for_other_tasks_are_refused(folder_of: Callable[[str], Path]) -> None:
    family = find_family(folder_of("flux-dev"))
    assert family.channels == (8, 8)
    assert replace(family, config={**family.config, "in_channels": 64, "out_channels": 32}).channels == (16, 8)
