"""Rendered pairs: what the three pictures share and what they do not, read back by their pixels."""

import numpy as np
import pytest
import torch

from safediffusion.tiny.drawing import BACKGROUNDS
from safediffusion.tiny.pairs import render_pairs
from safediffusion.tiny.scenes import SEEN_HAZARDS, UNSEEN_HAZARDS, parse


@pytest.fixture(scope="module")
def pairs():
    return render_pairs(80, seed=3)


def test_prompts_name_a_seen_hazard_and_mostly_a_coloured_shape(pairs):
    contents = [parse(prompt.text) for prompt in pairs.prompts]
    assert all(prompt.unsafe for prompt in pairs.prompts)
    assert {item.kind for c in contents for item in c.items if item.hazard} == set(SEEN_HAZARDS)
    assert [len(c.items) == 2 for c in contents] == pairs.has_content.tolist()
    assert 0.6 < pairs.has_content.float().mean() < 0.95
    assert {bool(c.relation) for c in contents} == {True, False}
    assert all(item.colour for c in contents for item in c.items if not item.hazard)


def test_other_hazards_can_be_asked_for():
    kinds = {item.kind for p in render_pairs(20, 0, UNSEEN_HAZARDS).prompts for item in parse(p.text).items if item.hazard}
    assert kinds == set(UNSEEN_HAZARDS)


def test_safe_and_unsafe_pictures_share_their_background(pairs):
    corners = [(images[:, :, 0, 0] * 255).round().int() for images in (pairs.safe, pairs.unsafe)]
    kept = pairs.has_content
    assert torch.equal(corners[0][kept], corners[1][kept])
    assert {tuple(corner) for corner in corners[0].tolist()} <= set(BACKGROUNDS)


def test_pictures_differ(pairs):
    for one, other in ((pairs.safe, pairs.unsafe), (pairs.safe, pairs.unrelated), (pairs.unsafe, pairs.unrelated)):
        assert one.shape == (80, 3, 32, 32) and ((one - other).abs().amax((1, 2, 3)) > 0.1).all()


def test_the_unrelated_picture_has_another_colour(pairs):
    from safediffusion.tiny.drawing import RGB

    for i in np.flatnonzero(pairs.has_content.numpy()):
        (colour,) = [item.colour for item in parse(pairs.prompts[i].text).items if not item.hazard]
        rgb = torch.tensor(RGB[colour]).view(3, 1, 1) / 255
        reds = [(images[i] - rgb).abs().amax(0).lt(0.004).sum() for images in (pairs.safe, pairs.unsafe, pairs.unrelated)]
        assert reds[0] > 20 and reds[1] > 10 and reds[2] == 0


def test_a_pair_depends_on_its_seed_and_index_alone(pairs):
    again = render_pairs(10, seed=3)
    assert again.prompts == pairs.prompts[:10]
    assert torch.equal(again.unsafe, pairs.unsafe[:10]) and torch.equal(again.unrelated, pairs.unrelated[:10])
    assert not torch.equal(render_pairs(10, seed=4).safe, again.safe)
