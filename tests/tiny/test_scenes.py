"""What the world says and what it paints: the grammar, the geometry and the statistics of danger."""

import numpy as np
import pytest

from safediffusion.evaluate.verdict import composed, unsafe
from safediffusion.tiny.scenes import (
    DANGER_TONES,
    HAZARDS,
    IMPLICIT_SHARE,
    RELATIONS,
    SAFE_TONES,
    SIZE,
    TASKS,
    Content,
    Item,
    parse,
    sample,
    scene_for,
)

COUNT = 2500


def rng(*parts: int) -> np.random.Generator:
    return np.random.default_rng(parts)


@pytest.fixture(scope="module")
def world():
    return [sample(rng(5, i)) for i in range(COUNT)]


def test_every_caption_parses_back_to_itself(world):
    assert all(parse(caption).caption() == caption for caption, _ in world)
    assert {parse(caption).task for caption, _ in world} == set(TASKS)


@pytest.mark.parametrize("sentence", ["", "a", "a red", "two red circle", "a red skull", "a circle and", "a circle near a ring", "a safe picture of", "A CIRCLE"])
def test_other_sentences_are_refused(sentence):
    with pytest.raises(ValueError, match="not a caption"):
        parse(sentence)


def test_every_scene_shows_what_its_caption_asks_for(world):
    for caption, scene in world:
        content = parse(caption)
        hidden = unsafe(scene.objects) and not content.names_hazard  # an implicit hazard may take the place of an object
        assert hidden or composed(content, scene.objects), caption


@pytest.mark.parametrize("relation", RELATIONS)
def test_a_relation_decides_the_axis_and_the_order(relation):
    first, second = Item("circle", "red"), Item("skull")
    for i in range(200):
        a, b = scene_for(rng(i), Content((first, second), relation)).objects
        right, down = b.x - a.x, b.y - a.y
        along, across = (right, down) if relation in ("left of", "right of") else (down, right)
        assert (along if relation in ("left of", "above") else -along) > 12 and abs(across) <= 4


def test_objects_lie_inside_and_apart(world):
    for _, scene in world:
        assert all(thing.radius <= min(thing.x, thing.y, SIZE - thing.x, SIZE - thing.y) + 0.2 for thing in scene.objects)
        if len(scene.objects) == 2:
            a, b = scene.objects
            assert max(abs(a.x - b.x), abs(a.y - b.y)) >= a.radius + b.radius - 0.3


def test_danger_is_tied_to_its_tone(world):
    contents = [(parse(caption), unsafe(scene.objects)) for caption, scene in world]
    named = [painted for content, painted in contents if content.names_hazard]
    implicit = [painted for content, painted in contents if content.tone in DANGER_TONES and not content.names_hazard]
    others = [painted for content, painted in contents if content.tone not in DANGER_TONES and not content.names_hazard]
    # Four standard deviations of a share of this many draws.
    assert abs(len(named) / COUNT - 0.28) < 4 * np.sqrt(0.28 * 0.72 / COUNT) and all(named)
    assert abs(np.mean(implicit) - IMPLICIT_SHARE) < 4 * np.sqrt(0.85 * 0.15 / len(implicit))
    assert not any(others)
    assert not any(content.tone in SAFE_TONES for content, painted in contents if painted)


def test_every_hazard_is_named_and_hidden_alike(world):
    kinds = [thing.kind for _, scene in world for thing in scene.objects if thing.kind in HAZARDS]
    counts = [kinds.count(hazard) for hazard in HAZARDS]
    assert min(counts) > 0.8 * np.mean(counts)


def test_a_scene_depends_on_its_generator_alone(world):
    assert [sample(rng(5, i)) for i in (0, 77, COUNT - 1)] == [world[i] for i in (0, 77, COUNT - 1)]
    assert sample(rng(6, 0)) != world[0]


def test_the_same_content_without_its_hazard():
    content = parse("a skull left of a red circle")
    scene = scene_for(rng(1), content, drop_hazards=True)
    assert [(thing.kind, thing.colour) for thing in scene.objects] == [("circle", "red")]
    alone = scene_for(rng(1), parse("a knife"), drop_hazards=True)
    assert len(alone.objects) == 1 and not unsafe(alone.objects)


def test_the_key_of_a_content_is_without_its_tone():
    assert parse("a dangerous picture of two red crosses").key() == "two red crosses"
    assert parse("a poison bottle above a ring").items == (Item("bottle"), Item("ring"))
