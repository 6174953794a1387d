"""What the networks are taught: the detector's targets, and the losses at their best and worst."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from safediffusion.detectors.objects import CELL, ObjectDetector
from safediffusion.evaluate.verdict import composed
from safediffusion.tiny.contrast import render_twins, sample_mirrored, sample_twins
from safediffusion.tiny.pretrain import cached_world, detector_exactness, detector_loss, detector_targets, render_world, worn
from safediffusion.tiny.scenes import COLOURS, KINDS, Painted, Scene, parse


class Answers(ObjectDetector):
    """A detector that says what it is told."""

    def __init__(self, *answer):
        super().__init__()
        self.answer = answer

    def forward(self, images):
        return self.answer


def logits(targets):
    """The answer of a detector that has learned its targets by heart."""
    heat, kind, colour, offset = targets
    one_hot = [20.0 * F.one_hot(part, count).permute(0, 3, 1, 2).float() for part, count in ((kind, len(KINDS)), (colour, len(COLOURS) + 1))]
    return heat.clamp(1e-4, 1 - 1e-4).logit(), *one_hot, offset


@pytest.fixture(scope="module")
def world():
    return render_world(60, seed=4)


def test_targets_name_the_nearest_object_and_where_it_is():
    heat, kind, colour, offset = detector_targets([Scene((Painted("ring", "blue", 9.0, 15.0, 6), Painted("saw", "", 24.5, 16.0, 6)), 0)])
    assert (heat[0] >= 0).all() and (heat[0] <= 1).all()
    for thing, column, row in (("ring", 2, 3), ("saw", 6, 3)):
        assert heat[0, row, column] > 0.5 and KINDS[kind[0, row, column]] == thing
    assert COLOURS[colour[0, 3, 2]] == "blue" and colour[0, 3, 6] == len(COLOURS)
    assert (2.5 + offset[0, 0, 3, 2]) * CELL == 9.0 and (3.5 + offset[0, 1, 3, 2]) * CELL == 15.0


def test_a_detector_that_knows_the_targets_reads_every_scene(world):
    targets = detector_targets(world.scenes)
    perfect = Answers(*logits(targets))
    assert detector_exactness(perfect, torch.zeros(60, 3, 32, 32), world.scenes).all()
    images = world.images(torch.arange(60))
    assert detector_loss(perfect, images, targets) < detector_loss(ObjectDetector(), images, targets) / 2


@dataclass(frozen=True)
class Reads:
    found: list

    def read(self, images):
        return self.found


def test_exact_means_all_of_it():
    scene = Scene((Painted("ring", "blue", 9, 15, 6), Painted("saw", "", 24, 16, 6)), 0)
    ring, saw = scene.objects
    answers = [
        (saw, ring),
        (replace(ring, x=12.5), saw),
        (replace(ring, x=13.5), saw),
        (replace(ring, colour="red"), saw),
        (ring,),
        (ring, saw, saw),
        (ring, replace(saw, kind="bomb")),
        (),
    ]
    exact = detector_exactness(Reads(answers), torch.zeros(len(answers), 3, 32, 32), [scene] * len(answers))
    assert exact.tolist() == [True, True, False, False, False, False, False, False]


def test_a_picture_depends_on_its_seed_and_index_alone(world, tmp_path):
    assert render_world(3, seed=4).captions == world.captions[:3]
    for _ in range(2):  # drawn, then read from the folder
        cached = cached_world(tmp_path, 3, 4)
        assert np.array_equal(cached.pixels, world.pixels[:3]) and cached.scenes == world.scenes[:3]


def test_worn_pictures_stay_pictures(world):
    images = world.images(torch.arange(60))
    seen = worn(images, torch.Generator().manual_seed(0))
    assert seen.min() >= 0 and seen.max() <= 1 and 0.005 < (seen - images).abs().mean() < 0.08
    assert torch.equal(seen, worn(images, torch.Generator().manual_seed(0)))


def test_twins_differ_in_what_they_say():
    pairs = [sample_twins(np.random.default_rng((8, i))) for i in range(400)]
    assert all(one != other for (one, _), (other, _) in pairs)
    hidden = [(parse(one), parse(other)) for (one, _), (other, _) in pairs if "danger" in one or "hazard" in one]
    calmed = [(one, other) for one, other in hidden if not one.names_hazard]
    assert calmed and all(one.items == other.items and one.tone != other.tone for one, other in calmed)


def test_twins_stand_next_to_each_other():
    pixels, captions = render_twins(5, seed=8)
    assert len(pixels) == len(captions) == 10 and pixels.dtype == np.uint8
    assert [captions[6], captions[7]] == [caption for caption, _ in sample_twins(np.random.default_rng((8, 3)))]


def test_mirrored_twins_differ_in_their_order_alone():
    for i in range(100):
        (caption, scene), (mirrored, other) = sample_mirrored(np.random.default_rng((9, i)))
        content, turned = parse(caption), parse(mirrored)
        assert (content.items, content.tone) == (turned.items, turned.tone) and content.relation != turned.relation
        assert composed(content, scene.objects) and composed(turned, other.objects)
        assert not composed(turned, scene.objects) and not composed(content, other.objects)
        assert [thing.colour for thing in scene.objects] == [thing.colour for thing in other.objects]
