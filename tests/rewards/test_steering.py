"""The steering reward: whose target moves, what its parts say, and what training relies on."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from safediffusion.config import resolve
from safediffusion.data.anchors import load_anchors
from safediffusion.encoders.clip import ClipEncoder
from safediffusion.errors import UserError
from safediffusion.rewards.direction import Direction, fit_direction, steered_target
from safediffusion.rewards.similarity import SimilarityReward
from safediffusion.rewards.steering import SteeringReward, SteeringSettings
from safediffusion.types import Prompt

PROMPTS = [
    Prompt("a red circle"),
    Prompt("a skull and a red circle", unsafe=True),
    Prompt("two blue rings"),
    Prompt("a dangerous picture of a star", unsafe=True),
]


@pytest.fixture(scope="module")
def direction(clip):
    return fit_direction(clip, load_anchors("pictograms"))


@pytest.fixture
def images():
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def targets(clip, direction, alpha, method="translation"):
    return steered_target(clip.text([prompt.text for prompt in PROMPTS]), direction, alpha, method)


@pytest.mark.parametrize("method", ["translation", "projection", "gated"])
def test_the_score_is_the_cosine_with_the_steered_target(clip, direction, images, method):
    scores = SteeringReward(clip, direction, 0.7, method)(images, PROMPTS)
    z = clip.image(images)
    torch.testing.assert_close(scores.total, (z * targets(clip, direction, 0.7, method)).sum(1))
    torch.testing.assert_close(scores.parts["alignment"], SimilarityReward(clip)(images, PROMPTS).total)
    torch.testing.assert_close(scores.parts["safety"], z @ direction.vector)


def test_unsafe_steers_the_marked_prompts_only(clip, direction, images):
    scores = SteeringReward(clip, direction, 0.7, steer="unsafe")(images, PROMPTS)
    everything = SteeringReward(clip, direction, 0.7)(images, PROMPTS)
    unsafe = torch.tensor([prompt.unsafe for prompt in PROMPTS])
    expected = torch.where(unsafe, everything.total, scores.parts["alignment"])
    torch.testing.assert_close(scores.total, expected)


def test_gated_steering_is_the_gated_method(clip, direction, images):
    by_steer = SteeringReward(clip, direction, 0.7, steer="gated")(images, PROMPTS)
    by_method = SteeringReward(clip, direction, 0.7, method="gated")(images, PROMPTS)
    by_both = SteeringReward(clip, direction, 0.7, method="gated", steer="gated")(images, PROMPTS)
    torch.testing.assert_close(by_steer.total, by_method.total)
    torch.testing.assert_close(by_both.total, by_method.total)


def test_permuting_a_batch_permutes_the_scores(clip, direction, images):
    reward, order = SteeringReward(clip, direction, 0.5, steer="gated"), [2, 0, 3, 1]
    straight = reward(images, PROMPTS)
    permuted = reward(images[order], [PROMPTS[i] for i in order])
    torch.testing.assert_close(permuted.total, straight.total[order])
    for name, part in straight.parts.items():
        torch.testing.assert_close(permuted.parts[name], part[order])


def test_the_gradient_reaches_every_picture(clip, direction, images):
    reward = SteeringReward(clip, direction, 0.5)
    assert reward.differentiable
    reward(images.requires_grad_(), PROMPTS).total.sum().backward()
    assert (images.grad.flatten(1).abs().sum(1) > 0).all()


def test_a_text_is_encoded_once(clip, direction, images):
    encoder = ClipEncoder(clip.model, clip.tokenizer, "counted", [])
    calls = []
    hook = encoder.model.text_model.register_forward_hook(lambda module, given, output: calls.append(1))
    reward = SteeringReward(encoder, direction, 0.5)
    for _ in range(3):
        reward(images, PROMPTS)
    hook.remove()
    assert len(calls) == 1


@pytest.mark.parametrize("steer", ["all", "unsafe"])
def test_a_safer_picture_scores_higher_once_steered(flat_encoder, steer):
    content, safety = torch.eye(12)[0], torch.eye(12)[1]
    encoder = flat_encoder({"danger": content - 0.5 * safety})
    pictures = torch.stack([content + 0.5 * safety, content - 0.5 * safety]).view(2, 3, 2, 2)
    prompts = [Prompt("danger", unsafe=True)] * 2
    direction = Direction(safety, "mean", "")
    plain = SimilarityReward(encoder)(pictures, prompts).total
    steered = SteeringReward(encoder, direction, 1.0, steer=steer)(pictures, prompts).total
    assert plain[0] < plain[1] and steered[0] > steered[1]


def test_pictures_of_nan_name_the_reward(clip, direction, images):
    images[1] = float("nan")
    for reward, name in ((SteeringReward(clip, direction, 0.5), "steering"), (SimilarityReward(clip), "similarity")):
        with pytest.raises(UserError, match=f"the reward '{name}' gave no finite total for 1 of 4 pictures"):
            reward(images, PROMPTS)


@pytest.mark.parametrize("choice", [{"method": "gated"}, {"steer": "gated"}])
def test_a_gate_is_asked_for_when_the_reward_is_built(clip, direction, choice):
    with pytest.raises(UserError, match="has no gate"):
        SteeringReward(clip, dataclasses.replace(direction, gate=None), 0.5, **choice)


def test_settings_take_auto_and_refuse_what_is_no_strength():
    assert resolve(SteeringSettings, {"encoder": "x", "alpha": "auto"}).alpha == "auto"
    assert resolve(SteeringSettings, {"encoder": "x", "alpha": 1}).alpha == 1.0
    for alpha in (-0.5, "high"):
        with pytest.raises(UserError, match="alpha"):
            resolve(SteeringSettings, {"encoder": "x", "alpha": alpha})
    with pytest.raises(UserError, match="encoder is missing"):
        resolve(SteeringSettings, {})


def test_similarity_is_the_cosine(clip, images):
    scores = SimilarityReward(clip)(images, PROMPTS)
    text = clip.text([prompt.text for prompt in PROMPTS])
    torch.testing.assert_close(scores.total, F.cosine_similarity(clip.image(images), text))
