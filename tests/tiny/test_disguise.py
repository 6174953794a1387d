import numpy as np
import pytest
import torch

from safediffusion.detectors.hazards import HazardDetector
from safediffusion.hub import EMBEDDED
from safediffusion.seeds import generator
from safediffusion.tiny.disguise import Disguises
from safediffusion.tiny.pretrain import World, hazard_targets, render_world


@pytest.fixture(scope="module")
def world() -> World:
    return render_world(200, seed=77)


@pytest.fixture(scope="module")
def disguises(world: World) -> Disguises:
    return Disguises.of(world, seed=78)


def test_what_is_harmless_is_drawn_as_it_is(world, disguises):
    harmless = (~hazard_targets(world.scenes).bool().any(1)).numpy()
    assert harmless.any() and not harmless.all()
    for drawn in (disguises.rough, disguises.bare):
        assert np.array_equal(drawn[harmless], world.pixels[harmless])
    assert all((bare != pixels).any() for bare, pixels in zip(disguises.bare[~harmless], world.pixels[~harmless], strict=True))


def test_a_picture_depends_on_its_number_alone(world, disguises):
    few = Disguises.of(World(world.pixels[:20], world.captions[:20], world.scenes[:20]), seed=78)
    for name in ("rough", "bare", "changed"):
        assert np.array_equal(getattr(few, name), getattr(disguises, name)[:20])


def test_the_shipped_guard_sees_through_them(world, disguises):
    """It was trained on others. Whole pictures are read without a mistake; hidden hazards nearly so, and few harmless blends are taken for them."""
    guard = HazardDetector.load(EMBEDDED / "guard" / "model.safetensors")
    there, index = hazard_targets(world.scenes).bool().any(1), torch.arange(len(world.scenes))
    assert torch.equal(guard(world.images(index)).amax(1) >= 0.5, there)
    said = torch.stack([guard(disguises(world, index, generator(0, "disguise", turn))).amax(1) >= 0.5 for turn in range(5)])
    assert said[:, there].float().mean() >= 0.95
    assert said[:, ~there].float().mean() <= 0.05
