"""The shipped anchor sets, and what an anchor file must hold."""

from collections import Counter

import pytest

from safediffusion.data.anchors import Anchors, load_anchors
from safediffusion.errors import UserError
from safediffusion.tiny.scenes import COLOURS, HAZARDS, SEEN_HAZARDS, SHAPES, parse


@pytest.mark.parametrize("name", ["compact", "broad", "pictograms"])
def test_shipped_sets_load(name):
    anchors = load_anchors(name)
    assert anchors.source and not set(anchors.safe) & set(anchors.unsafe)
    for side in (anchors.safe, anchors.unsafe):
        assert len(set(side)) == len(side)


def test_compact_is_as_published():
    anchors = load_anchors("compact")
    assert anchors.safe == (
        "a safe",
        "a non-violent, non-sexual image",
        "a wholesome, PG-rated photo",
        "an image with no nudity, no gore, no weapons",
        "appropriate image",
    )
    assert anchors.unsafe == (
        "explicit sexual content and nudity",
        "pornographic material",
        "an image with naked people engaged in sexual acts",
    )


def test_broad_is_at_least_as_wide_as_the_unpublished_one():
    anchors = load_anchors("broad")
    assert len(anchors.safe) >= 25 and len(anchors.unsafe) >= 20


def test_pictograms_differ_by_danger_alone():
    anchors = load_anchors("pictograms")
    sides = [[parse(caption) for caption in side] for side in (anchors.safe, anchors.unsafe)]
    kinds, colours = ([Counter(getattr(item, of) for content in side for item in content.items) for side in sides] for of in ("kind", "colour"))
    assert not set(kinds[0]) & set(HAZARDS)
    assert set(kinds[1]) & set(HAZARDS) == set(SEEN_HAZARDS)
    assert set(kinds[0]) == set(SHAPES) and set(kinds[1]) >= set(SHAPES)
    assert set(colours[0]) == set(colours[1]) == {"", *COLOURS}
    # A direction that knew more objects on one side would pay for fewer objects, and composition would go.
    assert Counter(len(c.items) for c in sides[0]) == Counter(len(c.items) for c in sides[1])
    assert not any("danger" in c.tone or "hazard" in c.tone for c in sides[0])
    assert not any("safe" in c.tone or "friend" in c.tone for c in sides[1])


def test_the_digest_is_of_the_phrases():
    one = Anchors(source="here", safe=("a",), unsafe=("b",))
    assert one.digest == Anchors(source="there", safe=("a",), unsafe=("b",)).digest
    assert one.digest != Anchors(safe=("a", "b"), unsafe=("b",)).digest


def test_a_users_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('safe = ["calm"]\nunsafe = ["storm"]\n')
    assert load_anchors(path) == Anchors(safe=("calm",), unsafe=("storm",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('safe = ["a"]', "unsafe is empty"),
        ('unsave = ["a"]', "did you mean unsafe"),
        ('unsafe = "a"', "unsafe should be a list"),
    ],
)
def test_a_file_with_a_mistake(tmp_path, content, message):
    path = tmp_path / "mine.toml"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        load_anchors(str(path))


def test_a_name_that_is_not_shipped():
    with pytest.raises(UserError, match=r"anchors = 'braod' is not one of broad, compact, pictograms"):
        load_anchors("braod")
    with pytest.raises(UserError, match="does not exist"):
        load_anchors("nowhere.toml")
