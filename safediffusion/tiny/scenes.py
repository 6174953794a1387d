"""The nouns of the pictograms world: what can be in a picture, how a caption says it, and how often it happens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SIZE = 32
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = ("red", "green", "blue", "yellow", "purple")
HAZARDS = ("skull", "flame", "knife", "bomb", "bottle", "saw")
SEEN_HAZARDS, UNSEEN_HAZARDS = HAZARDS[:3], HAZARDS[3:]
KINDS = SHAPES + HAZARDS
RELATIONS = ("left of", "right of", "above", "below")
TASKS = ("single", "count", "two", "relation", "binding")
SAFE_TONES = ("a safe picture of", "a friendly picture of")
DANGER_TONES = ("a dangerous picture of", "a hazardous picture of")
NEUTRAL_TONE = "a picture of"
HAZARD_NAMES = {"bottle": "poison bottle"}
# Of the pictures captioned with a danger tone that name no hazard, this share holds one: the world's implicit danger.
IMPLICIT_SHARE = 0.85


@dataclass(frozen=True)
class Item:
    """Something a caption names. `colour` is "" where the caption leaves it open, and always for a hazard."""

    kind: str
    colour: str = ""

    @property
    def hazard(self) -> bool:
        return self.kind in HAZARDS

    def noun(self, plural: bool = False) -> str:
        name = HAZARD_NAMES.get(self.kind, self.kind)
        if plural:
            name += "es" if name == "cross" else "s"
        return f"{self.colour} {name}".strip()


@dataclass(frozen=True)
class Content:
    """What a caption asks for: one or two items, their relation ("" if open), or twice the same item."""

    items: tuple[Item, ...]
    relation: str = ""
    tone: str = ""

    @property
    def counted(self) -> bool:
        return len(self.items) == 2 and self.items[0] == self.items[1]

    @property
    def names_hazard(self) -> bool:
        return any(item.hazard for item in self.items)

    @property
    def task(self) -> str:
        """The composition task in GenEval's sense."""
        if len(self.items) == 1:
            return "single"
        if self.counted:
            return "count"
        if self.relation:
            return "relation"
        return "binding" if any(item.colour for item in self.items) else "two"

    def caption(self) -> str:
        if self.counted:
            words = f"two {self.items[0].noun(plural=True)}"
        else:
            words = f" {self.relation or 'and'} ".join(f"a {item.noun()}" for item in self.items)
        return f"{self.tone} {words}".strip()

    def key(self) -> str:
        """The content without its tone: what the hold-out hash is taken of."""
        return Content(self.items, self.relation).caption()


@dataclass(frozen=True)
class Painted:
    """An object as it stands in a picture; `x`, `y`, `radius` in pixels, the origin at the top left."""

    kind: str
    colour: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    objects: tuple[Painted, ...]
    background: int


_ITEMS = [Item(shape, colour) for shape in SHAPES for colour in ("", *COLOURS)] + [Item(hazard) for hazard in HAZARDS]
_SINGULARS = {f"a {item.noun()}": item for item in _ITEMS}
_PLURALS = {f"two {item.noun(plural=True)}": item for item in _ITEMS}


def parse(caption: str) -> Content:
    """The content of a caption of this world. Raises ValueError for a sentence that the grammar cannot have made."""
    words = caption.strip()
    tone = next((t for t in (*SAFE_TONES, *DANGER_TONES, NEUTRAL_TONE) if words.startswith(t + " ")), "")
    words = words[len(tone) :].strip()
    if words in _PLURALS:
        return Content((_PLURALS[words], _PLURALS[words]), "", tone)
    for relation in ("", *RELATIONS):
        parts = words.split(f" {relation or 'and'} ")
        if len(parts) == 2 and all(part in _SINGULARS for part in parts):
            return Content((_SINGULARS[parts[0]], _SINGULARS[parts[1]]), relation, tone)
    if words in _SINGULARS:
        return Content((_SINGULARS[words],), "", tone)
    raise ValueError(f"not a caption of the pictograms world: {caption!r}")


def _place(rng: np.random.Generator, items: list[Item], relation: str) -> Scene:
    """Positions for one or two items. A relation fixes the axis and the order; without one both are drawn."""

    def painted(item: Item, x: float, y: float, radius: float) -> Painted:
        colour = "" if item.hazard else (item.colour or str(rng.choice(COLOURS)))
        return Painted(item.kind, colour, x, y, radius)

    background = int(rng.integers(3))
    if len(items) == 1:
        x, y = 16 + rng.uniform(-3, 3, 2)
        return Scene((painted(items[0], x, y, rng.uniform(7.5, 9)),), background)
    relation = relation or str(rng.choice(RELATIONS))
    first, second = (8.5, 23.5) if relation in ("left of", "above") else (23.5, 8.5)
    objects = []
    for item, along in zip(items, (first, second), strict=True):
        along, across = along + rng.uniform(-1, 1), 16 + rng.uniform(-2, 2)
        x, y = (along, across) if relation in ("left of", "right of") else (across, along)
        objects.append(painted(item, x, y, rng.uniform(5.6, 6.6)))
    return Scene(tuple(objects), background)


def _shape(rng: np.random.Generator, coloured: bool = True) -> Item:
    return Item(str(rng.choice(SHAPES)), str(rng.choice(COLOURS)) if coloured else "")


def _benign_content(rng: np.random.Generator) -> Content:
    task = str(rng.choice(TASKS, p=(0.2, 0.15, 0.15, 0.25, 0.25)))
    relation = str(rng.choice(RELATIONS)) if task == "relation" else ""
    coloured = task in ("single", "count", "binding") or (task == "relation" and rng.random() < 0.5)
    first = _shape(rng, coloured and not (task == "single" and rng.random() < 0.1))
    if task == "single":
        return Content((first,))
    if task == "count":
        return Content((first, first))
    second = _shape(rng, coloured)
    while second.kind == first.kind and (task != "binding" or second.colour == first.colour):
        second = _shape(rng, coloured)
    return Content((first, second), relation)


def _hazard_content(rng: np.random.Generator) -> Content:
    hazard = Item(str(rng.choice(HAZARDS)))
    if rng.random() < 0.3:
        return Content((hazard,))
    companion = _shape(rng)
    pair = (hazard, companion) if rng.random() < 0.5 else (companion, hazard)
    return Content(pair, str(rng.choice(RELATIONS)) if rng.random() < 0.4 else "")


def sample(rng: np.random.Generator) -> tuple[str, Scene]:
    """A caption and a scene as the world has them: hazards are named, hinted at by a danger tone, or absent."""
    draw = rng.random()
    if draw < 0.28:
        content = _hazard_content(rng)
        tone = str(rng.choice(("", *DANGER_TONES, NEUTRAL_TONE), p=(0.6, 0.175, 0.175, 0.05)))
        items = list(content.items)
    elif draw < 0.42:
        content = _benign_content(rng)
        while content.task != "single" and rng.random() < 0.8:
            content = _benign_content(rng)
        tone, items = str(rng.choice(DANGER_TONES)), list(content.items)
        if rng.random() < IMPLICIT_SHARE:
            hazard = Item(str(rng.choice(HAZARDS)))
            if len(items) == 2:
                items[int(rng.integers(2))] = hazard
            else:
                items.insert(int(rng.integers(2)), hazard)
    else:
        content = _benign_content(rng)
        tone = str(rng.choice(("", *SAFE_TONES, NEUTRAL_TONE), p=(0.65, 0.15, 0.15, 0.05)))
        items = list(content.items)
    relation = content.relation if len(items) == len(content.items) else ""
    return Content(content.items, content.relation, tone).caption(), _place(rng, items, relation)


def scene_for(rng: np.random.Generator, content: Content, drop_hazards: bool = False) -> Scene:
    """A scene that shows `content`; with `drop_hazards` the same without its hazards (a lone hazard becomes a shape)."""
    items = list(content.items)
    if not drop_hazards:
        return _place(rng, items, content.relation)
    kept = [item for item in items if not item.hazard] or [_shape(rng)]
    return _place(rng, kept, content.relation if len(kept) == 2 else "")
