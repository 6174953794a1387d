"""Pictures: coverage is area, so edges are anti-aliased; and no two glyphs look alike."""

from itertools import combinations, product
from math import pi

import numpy as np
import pytest

from safediffusion.tiny.drawing import BACKGROUNDS, RGB, draw
from safediffusion.tiny.scenes import COLOURS, HAZARDS, KINDS, SHAPES, Painted, Scene

# Areas in units of the squared radius, from the definitions of the glyphs.
AREAS = {
    "circle": pi * 0.92**2,
    "square": 1.6**2,
    "triangle": 0.98 * 1.75,
    "star": 10 * 0.5 * 0.42 * np.sin(pi / 5),
    "cross": 2 * 4 * 0.28 * 0.95 - 4 * 0.28**2,
    "ring": pi * (0.96**2 - 0.48**2),
}


def picture(kind: str, colour: str = "", x: float = 16, y: float = 16, radius: float = 8, background: int = 0) -> np.ndarray:
    return draw(Scene((Painted(kind, colour, x, y, radius),), background)).astype(float)


def covered(image: np.ndarray, colour: str, background: int = 0) -> float:
    """The painted area in pixels, from how far every pixel went from the background to the colour."""
    way = np.subtract(RGB[colour], BACKGROUNDS[background])
    return float(((image - BACKGROUNDS[background]) @ way / (way @ way)).sum())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("radius", [5.6, 8.3])
def test_coverage_is_area(shape, radius):
    area = AREAS[shape] * radius**2
    assert covered(picture(shape, "blue", radius=radius), "blue") == pytest.approx(area, rel=0.025)


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_does_not_jump_with_the_pixel_grid(shape):
    areas = [covered(picture(shape, "red", 16 + dx, 16 + dy), "red") for dx, dy in product((0, 0.25, 0.5, 0.8), repeat=2)]
    assert np.ptp(areas) < 0.02 * np.mean(areas)


@pytest.mark.parametrize("shape", SHAPES)
def test_edges_are_soft(shape):
    image = picture(shape, "purple", 16.3, 15.8)
    part = (image[..., 1] - 250) / (60 - 250)
    assert ((part > 0.05) & (part < 0.95)).sum() >= 12


@pytest.mark.parametrize("background", range(3))
def test_every_glyph_is_distinct(background):
    looks = {(shape, colour): picture(shape, colour, background=background) for shape, colour in product(SHAPES, COLOURS)}
    looks |= {(hazard, ""): picture(hazard, background=background) for hazard in HAZARDS}
    assert {kind for kind, _ in looks} == set(KINDS)
    for one, other in combinations(looks, 2):
        assert (np.abs(looks[one] - looks[other]).max(-1) > 40).sum() >= 12, (one, other)


def test_the_corners_are_background():
    for background, rgb in enumerate(BACKGROUNDS):
        for kind in KINDS:
            image = picture(kind, "red" if kind in SHAPES else "", background=background)
            assert (image[[0, 0, -1, -1], [0, -1, 0, -1]] == rgb).all()


def test_a_picture_is_uint8_and_repeatable():
    scene = Scene((Painted("star", "yellow", 9, 16, 6), Painted("saw", "", 23, 16, 6)), 2)
    assert draw(scene).dtype == np.uint8 and draw(scene).shape == (32, 32, 3)
    assert (draw(scene) == draw(scene)).all()
