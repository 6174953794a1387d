"""Scenes to pixels: every glyph is a stack of signed distances, so edges are anti-aliased exactly and cheaply."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from safediffusion.tiny.scenes import HAZARDS, SHAPES, SIZE, Painted, Scene

Array = np.ndarray
Distance = Callable[[Array, Array], Array]

RGB = {
    "red": (214, 40, 40),
    "green": (46, 140, 60),
    "blue": (38, 84, 200),
    "yellow": (240, 190, 20),
    "purple": (140, 60, 170),
}
BACKGROUNDS = ((250, 250, 250), (226, 214, 192), (186, 206, 222))
_INK, _STEEL, _WOOD = (30, 30, 36), (105, 112, 122), (120, 72, 36)
_PAPER, _ORANGE, _SUN, _VENOM = (250, 250, 250), (238, 112, 24), (252, 216, 70), (20, 96, 84)
OBJECT = None  # a layer of this colour takes the colour of the object


def _circle(cx: float, cy: float, r: float) -> Distance:
    return lambda x, y: np.hypot(x - cx, y - cy) - r


def _box(cx: float, cy: float, w: float, h: float) -> Distance:
    def distance(x: Array, y: Array) -> Array:
        dx, dy = np.abs(x - cx) - w, np.abs(y - cy) - h
        return np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0)

    return distance


def _segment(ax: float, ay: float, bx: float, by: float, r: float) -> Distance:
    def distance(x: Array, y: Array) -> Array:
        ex, ey = bx - ax, by - ay
        t = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey), 0, 1)
        return np.hypot(x - ax - t * ex, y - ay - t * ey) - r

    return distance


def _polygon(*points: tuple[float, float]) -> Distance:
    """Exact distance to a simple polygon (Quilez, "2D distance functions")."""

    def distance(x: Array, y: Array) -> Array:
        best, sign = np.full(x.shape, np.inf), np.ones(x.shape)
        for (ax, ay), (bx, by) in zip(points, points[-1:] + points[:-1], strict=True):
            ex, ey, wx, wy = bx - ax, by - ay, x - ax, y - ay
            t = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0, 1)
            best = np.minimum(best, np.hypot(wx - t * ex, wy - t * ey))
            low, high, left = y >= ay, y < by, ex * wy > ey * wx
            sign = np.where((low & high & left) | (~low & ~high & ~left), -sign, sign)
        return sign * best

    return distance


def _union(*parts: Distance) -> Distance:
    return lambda x, y: np.minimum.reduce([part(x, y) for part in parts])


def _star() -> tuple[tuple[float, float], ...]:
    angles = np.pi * (np.arange(10) / 5 - 0.5)
    radii = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
    return tuple((float(r * np.cos(a)), float(r * np.sin(a))) for a, r in zip(angles, radii, strict=True))


_SAW_TEETH = tuple((-1 + 0.2 * i, 0.35 + 0.3 * (i % 2)) for i in range(8))
GLYPHS: dict[str, tuple[tuple[Distance, tuple[int, int, int] | None], ...]] = {
    "circle": ((_circle(0, 0, 0.92), OBJECT),),
    "square": ((_box(0, 0, 0.8, 0.8), OBJECT),),
    "triangle": ((_polygon((0, -0.95), (0.98, 0.8), (-0.98, 0.8)), OBJECT),),
    "star": ((_polygon(*_star()), OBJECT),),
    "cross": ((_union(_box(0, 0, 0.28, 0.95), _box(0, 0, 0.95, 0.28)), OBJECT),),
    "ring": ((lambda x, y: np.abs(np.hypot(x, y) - 0.72) - 0.24, OBJECT),),
    "skull": (
        (_union(_circle(0, -0.2, 0.78), _box(0, 0.6, 0.42, 0.36)), _INK),
        (_union(_circle(-0.33, -0.15, 0.22), _circle(0.33, -0.15, 0.22)), _PAPER),
        (_union(_box(0, 0.72, 0.06, 0.24), _box(0, 0.2, 0.07, 0.1)), _PAPER),
    ),
    "flame": (
        (_polygon((0.1, -1), (0.5, -0.35), (0.75, -0.6), (0.85, 0.3), (0.45, 0.95), (-0.45, 0.95), (-0.85, 0.3), (-0.5, -0.4), (-0.25, -0.1)), _ORANGE),
        (_polygon((0.05, -0.1), (0.42, 0.5), (0.2, 0.88), (-0.25, 0.88), (-0.42, 0.45)), _SUN),
    ),
    "knife": (
        (_polygon((0.95, -0.95), (0.75, -0.2), (-0.05, 0.45), (-0.4, 0.1)), _STEEL),
        (_segment(-0.3, 0.35, -0.8, 0.85, 0.17), _WOOD),
    ),
    "bomb": (
        (_circle(-0.12, 0.22, 0.72), _INK),
        (_segment(0.32, -0.3, 0.62, -0.62, 0.11), _WOOD),
        (_circle(0.72, -0.74, 0.25), _ORANGE),
    ),
    "bottle": (
        (_union(_box(0, 0.38, 0.55, 0.58), _box(0, -0.5, 0.2, 0.4)), _VENOM),
        (_box(0, -0.88, 0.26, 0.12), _INK),
        (_box(0, 0.4, 0.36, 0.3), _PAPER),
        (_union(_segment(-0.2, 0.24, 0.2, 0.56, 0.08), _segment(-0.2, 0.56, 0.2, 0.24, 0.08)), _INK),
    ),
    "saw": (
        (_polygon((-1, -0.2), (0.45, -0.45), (0.45, 0.35), *reversed(_SAW_TEETH)), _STEEL),
        (_union(_box(0.68, -0.05, 0.28, 0.5)), _WOOD),
        (_box(0.68, -0.05, 0.1, 0.22), _PAPER),
    ),
}  # fmt: skip
_Y, _X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float64) + 0.5


def _paint(canvas: Array, thing: Painted, left_out: float, dressed: bool, rng: np.random.Generator) -> None:
    x, y = (_X - thing.x) / thing.radius, (_Y - thing.y) / thing.radius
    body, *details = GLYPHS[thing.kind]
    if dressed and thing.kind in HAZARDS:
        body = GLYPHS[str(rng.choice(SHAPES))][0][0], body[1]
    for distance, colour in (body, *(each for each in details if not left_out or rng.random() >= left_out)):
        # Coverage of a pixel by a half-plane at signed distance d (in pixels) is close to 1/2 - d.
        cover = np.clip(0.5 - distance(x, y) * thing.radius, 0, 1)[..., None]
        canvas += cover * (np.asarray(RGB[thing.colour] if colour is OBJECT else colour) - canvas)


def draw(scene: Scene, left_out: float = 0.0, seed: tuple[int, ...] = (0,), dressed: bool = False) -> Array:
    """The picture of a scene, uint8 `(32, 32, 3)`.

    left_out: the share of the details of its glyphs that is not drawn, by chance.
    dressed: hazards have their colours and details and the outline of a shape, by chance which.
    """
    rng = np.random.default_rng(seed)
    canvas = np.empty((SIZE, SIZE, 3))
    canvas[:] = BACKGROUNDS[scene.background]
    for thing in scene.objects:
        _paint(canvas, thing, left_out, dressed, rng)
    return np.round(canvas).astype(np.uint8)
