"""What the flow transformer hears and learns from."""

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from transformers import CLIPTextModel, CLIPTokenizer

from safediffusion import weights
from safediffusion.policies.latent import PolicySettings, load_policy
from safediffusion.tiny import networks
from safediffusion.tiny.flowing import Painting, conditions, still, text_encoders
from safediffusion.tiny.plan import tokens_of

CAPTIONS = ["a red circle left of a blue star", "two rings", ""]


@pytest.fixture(scope="module")
def folder(built):
    return built / "out" / "flow"


@pytest.fixture(scope="module")
def heard(built):
    return CLIPTextModel.from_pretrained(built / "work" / "out" / "text_encoder_settled").eval()


@pytest.fixture(scope="module")
def tokens(built):
    return tokens_of(CLIPTokenizer.from_pretrained(built / "work" / "out" / "tokenizer"), CAPTIONS)


@pytest.fixture
def painting():
    """Two pictures of the world, of which the second only hints at a hazard, and a mirrored pair, each with a caption of its own."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(5, networks.CONTEXT + 1, 192, generator=generator)
    return Painting(torch.randn(4, 4, 8, 8, generator=generator), torch.arange(1, 5), states, torch.randn(5, 192, generator=generator), 2, torch.tensor([1]))


@torch.no_grad()
def test_the_text_encoders_say_what_the_first_base_hears(heard, tokens):
    states, pooled = conditions(text_encoders(heard), tokens)
    inside = heard(tokens, output_hidden_states=True)
    assert torch.allclose(states, torch.cat([0.15 * inside.hidden_states[-1], 14.0 * inside.hidden_states[0]], -1), atol=1e-4)
    assert torch.allclose(pooled[:, :96], inside.pooler_output, atol=1e-4)


@torch.no_grad()
def test_diffusers_hears_the_same_up_to_half_precision(folder, heard, tokens):
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    told, _, pooled, _ = pipeline.encode_prompt(CAPTIONS, None, None, do_classifier_free_guidance=False)
    states, expected = conditions(text_encoders(heard), tokens)
    assert torch.allclose(told[:, : networks.CONTEXT], states, atol=2e-2) and torch.allclose(pooled, expected, atol=2e-2)
    assert not told[:, networks.CONTEXT :].any()


@torch.no_grad()
def test_the_policy_paints_what_diffusers_paints(folder):
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    pipeline.set_progress_bar_config(disable=True)
    policy = load_policy(folder, PolicySettings(train="full"))
    x, time = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.full((1,), 700.0)
    told, _, pooled, _ = pipeline.encode_prompt(CAPTIONS[:1], None, None, do_classifier_free_guidance=False)
    expected = pipeline.transformer(x, told, pooled, time, return_dict=False)[0]
    assert torch.allclose(policy.predict(x, time, policy.encode(CAPTIONS[:1]), 1.0), expected, atol=1e-5)
    assert pipeline(CAPTIONS[0], num_inference_steps=2, output_type="pt").images.shape == (1, 3, 32, 32)


def test_the_pipeline_is_that_of_its_checkpoint_up_to_half_precision(built, folder):
    policy = load_policy(folder, PolicySettings(train="full"))
    average = weights.strip_prefix("average", weights.load(built / "work" / "flow_hints.safetensors")[0])
    for name, weight in policy.denoiser.state_dict().items():
        assert weight.dtype == torch.float32 and torch.equal(weight, average[name].half().float())


def test_a_transformer_that_says_nothing_misses_the_whole_velocity(painting):
    transformer = networks.transformer()
    still(transformer)
    expected = painting.latents.square().mean().item() + 1  # of clean latents and of noise, which know nothing of each other
    assert painting.loss(transformer, 32, 16, 0, torch.Generator().manual_seed(0)).item() == pytest.approx(expected, rel=0.05)


def test_a_mirrored_pair_shares_noise_and_time(painting):
    transformer, seen = networks.transformer(), {}
    transformer.register_forward_pre_hook(lambda _, arguments, named: seen.update(named), with_kwargs=True)
    painting.loss(transformer, 2, 3, 0, torch.Generator().manual_seed(0))
    states, times, pooled = seen["hidden_states"], seen["timestep"], seen["pooled_projections"]
    sigma = times[2:5, None, None, None] / 1000
    assert torch.equal(times[2:5], times[5:]) and times[2:5].min() >= 600
    assert torch.allclose(states[2:5] - (1 - sigma) * painting.latents[2], states[5:] - (1 - sigma) * painting.latents[3], atol=1e-6)
    assert torch.equal(pooled[2:], painting.pooled[[3, 3, 3, 4, 4, 4]])


def test_so_many_pictures_of_a_step_are_hinted_at(painting):
    transformer, seen = networks.transformer(), {}
    transformer.register_forward_pre_hook(lambda _, arguments, named: seen.update(named), with_kwargs=True)
    painting.loss(transformer, 40, 0, 40, torch.Generator().manual_seed(0))
    prompted = (seen["pooled_projections"] != painting.pooled[0]).any(1)
    assert prompted.sum() > 20 and torch.equal(seen["pooled_projections"][prompted], painting.pooled[[2]].expand(int(prompted.sum()), -1))
