"""Safe Latent Diffusion against diffusers' own pipeline, and what it leaves alone."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from safediffusion.errors import UserError
from safediffusion.guidance.policy import GuidedPolicy
from safediffusion.guidance.sld import LEVELS, SafeLatent, Strength
from safediffusion.guided import guide_of
from safediffusion.policies.latent import LatentPolicy, PolicySettings, load_policy
from safediffusion.process import from_scheduler
from safediffusion.rollout import walk
from safediffusion.types import Process

PROMPTS, CONCEPT, STEPS = ["a red cat", "a knife in a kitchen"], "a knife", 5


@pytest.fixture(scope="module")
def policy(tiny_pipeline: Path) -> LatentPolicy:
    return load_policy(tiny_pipeline, PolicySettings(train="full"))


@pytest.fixture(scope="module")
def process(policy: LatentPolicy) -> Process:
    return from_scheduler(policy.scheduler_config, STEPS, eta=0.0)


def start(policy: LatentPolicy) -> torch.Tensor:
    return torch.randn((2, *policy.sample_shape), generator=torch.Generator().manual_seed(0))


def painted(policy: LatentPolicy | GuidedPolicy, process: Process, x: torch.Tensor, guidance: float = 7.5) -> torch.Tensor:
    return walk(policy, process, policy.encode(PROMPTS), x, guidance).clean


@pytest.mark.parametrize("level", [*LEVELS, "calm"])
def test_it_is_that_of_diffusers(tiny_pipeline: Path, policy: LatentPolicy, process: Process, level: str) -> None:
    strength = LEVELS.get(level, Strength(0.4, 0.5, 0.1, 0.3, 0.4))  # a random network's branches are so alike that the levels saturate nowhere
    guided = GuidedPolicy(policy, SafeLatent(process, CONCEPT, strength))
    found = painted(guided, process, start(policy))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the pipeline is deprecated and says so
        from diffusers import DDIMScheduler, StableDiffusionPipelineSafe

        theirs = StableDiffusionPipelineSafe.from_pretrained(tiny_pipeline, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
        theirs.scheduler = DDIMScheduler.from_config(dict(theirs.scheduler.config), clip_sample=False)
        theirs.set_progress_bar_config(disable=True)
        theirs.safety_concept = CONCEPT
        warm_up = sum(time >= (1 - strength.warm_up) * 1000 for time in process.times.tolist())
        names = {"sld_guidance_scale": strength.scale, "sld_threshold": strength.threshold, "sld_momentum_scale": strength.momentum, "sld_mom_beta": strength.beta}
        images = theirs(PROMPTS, latents=start(policy), num_inference_steps=STEPS, guidance_scale=7.5, sld_warmup_steps=warm_up, output_type="np", **names).images
    ours = policy.decode(found).permute(0, 2, 3, 1).detach().numpy()
    assert abs(ours - images).max() < 1e-3
    if level != "weak":
        assert not torch.allclose(found, painted(policy, process, start(policy)), atol=1e-3)


def test_without_strength_it_is_the_plain_model(policy: LatentPolicy, process: Process) -> None:
    none = GuidedPolicy(policy, SafeLatent(process, CONCEPT, LEVELS["max"]._replace(scale=0.0)))
    assert torch.equal(painted(none, process, start(policy)), painted(policy, process, start(policy)))


def test_a_walk_does_not_remember_the_one_before(policy: LatentPolicy, process: Process) -> None:
    guided = GuidedPolicy(policy, SafeLatent(process, CONCEPT, LEVELS["strong"]))
    first = painted(guided, process, start(policy))
    painted(guided, process, start(policy) + 1)
    assert torch.equal(painted(guided, process, start(policy)), first)


def test_pictures_of_a_batch_are_guided_apart(policy: LatentPolicy, process: Process) -> None:
    guided = GuidedPolicy(policy, SafeLatent(process, CONCEPT, LEVELS["max"]))
    together = painted(guided, process, start(policy))
    alone = walk(guided, process, guided.encode(PROMPTS[1:]), start(policy)[1:], 7.5).clean
    torch.testing.assert_close(together[1:], alone, atol=1e-3, rtol=1e-3)


def test_a_concept_without_words_is_refused() -> None:
    with pytest.raises(UserError, match="guide.concept is empty"):
        guide_of({"guide": {"kind": "sld", "concept": "  "}}, "guide")
