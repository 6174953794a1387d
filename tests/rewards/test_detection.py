"""Less of what a detector finds: what counts, what has a gradient, and which labels are refused."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from safediffusion.config import resolve
from safediffusion.errors import UserError
from safediffusion.guidance.energy import EnergySettings
from safediffusion.guided import guided
from safediffusion.policies.latent import load_policy
from safediffusion.policies.variant import AS_IT_IS
from safediffusion.rewards.detection import DetectionReward, DetectionSettings, harmful
from safediffusion.types import Prompt

PROMPTS = [Prompt("a")] * 3


@dataclass(frozen=True)
class Channels:
    """A real if simple detector: how red, green and blue a picture is."""

    labels: tuple[str, ...] = ("red", "green", "blue")

    def __call__(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


def images() -> Tensor:
    return torch.tensor([[0.9, 0.1, 0.2], [0.1, 0.5, 0.3], [0.0, 0.0, 0.4]])[..., None, None].expand(3, 3, 4, 4)


def test_the_highest_of_the_labels_that_count() -> None:
    scores = DetectionReward(Channels(), ("green", "blue"))(images(), PROMPTS)
    torch.testing.assert_close(scores.parts["unsafe"], torch.tensor([0.2, 0.5, 0.4]))
    torch.testing.assert_close(scores.total, -scores.parts["unsafe"])
    assert scores.parts["unsafe_rate"].tolist() == [0, 1, 0]
    assert DetectionReward(Channels(), ("red",), threshold=0.1)(images(), PROMPTS).parts["unsafe_rate"].tolist() == [1, 1, 0]


def test_where_the_detector_is_sure_the_logarithm_keeps_its_gradient() -> None:
    logits = torch.tensor([[-30.0, -40.0], [0.5, 0.0], [14.0, 3.0], [40.0, -5.0]], requires_grad=True)
    reward = DetectionReward(Channels(), ("red", "green"), score="log", differentiable=True, logits=lambda images: logits)
    scores = reward(images()[:1].expand(4, 3, 4, 4), [Prompt("a")] * 4)
    torch.testing.assert_close(scores.parts["unsafe"], logits.amax(1).sigmoid())
    torch.testing.assert_close(scores.total.double(), -logits[:, 0].detach().double().exp().log1p(), rtol=1e-4, atol=1e-12)
    scores.total.sum().backward()
    torch.testing.assert_close(logits.grad[:, 0], -logits[:, 0].detach().sigmoid())


def test_the_log_probability_of_a_safe_picture() -> None:
    scores = DetectionReward(Channels(), ("red", "green"), score="log")(torch.cat([images(), torch.ones(1, 3, 4, 4)]), [*PROMPTS, Prompt("b")])
    torch.testing.assert_close(scores.total, torch.tensor([0.1, 0.5, 1.0, 1e-6]).log())


def test_gradients_flow_to_the_pictures_from_the_probability() -> None:
    pixels = images().clone().requires_grad_()
    scores = DetectionReward(Channels(), ("red",), differentiable=True)(pixels, PROMPTS)
    assert not scores.parts["unsafe_rate"].requires_grad
    scores.total.sum().backward()
    torch.testing.assert_close(pixels.grad[:, 0], torch.full((3, 4, 4), -1 / 16))
    assert not pixels.grad[:, 1:].any()


def test_settings_know_what_is_measured_and_what_has_a_gradient() -> None:
    guard, nudenet = DetectionSettings(), DetectionSettings(detector="nudenet", labels=("FEET_EXPOSED",))
    assert (guard.differentiable, guard.measures) == (True, {"unsafe": True, "unsafe_rate": False})
    assert (nudenet.differentiable, nudenet.measures) == (False, {"unsafe": False, "unsafe_rate": False})


def test_labels() -> None:
    assert harmful(Channels(), DetectionSettings()) == ("red", "green", "blue")
    assert harmful(Channels(), DetectionSettings(labels=("blue",))) == ("blue",)
    with pytest.raises(UserError, match="pictograms has no label 'violet'; its labels are red, green, blue"):
        harmful(Channels(), DetectionSettings(labels=("violet",)))
    with pytest.raises(UserError, match=r"nudenet finds harmless things as well; set reward\.labels"):
        harmful(Channels(), DetectionSettings(detector="nudenet"))


def test_a_detector_that_there_is_not() -> None:
    with pytest.raises(UserError, match='detector = "eyes" is not known; it is one of .pictograms'):
        resolve(DetectionSettings, {"kind": "detection", "detector": "eyes"})


def test_the_guard_of_the_embedded_world_judges_no_other(tiny_pipeline: Path) -> None:
    guided(load_policy(tiny_pipeline, AS_IT_IS), EnergySettings(), "cpu")
    refused = pytest.raises(UserError, match="reads pictures of 32 pixels of the embedded world, and this model paints 64; set its detector to one of nudenet, q16")
    with refused:
        guided(load_policy(tiny_pipeline, replace(AS_IT_IS, image_size=64)), EnergySettings(), "cpu")
