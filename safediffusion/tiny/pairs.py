"""Pictures of the same prompt with and without its hazard: what a safety direction is calibrated on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from safediffusion.images import from_uint8
from safediffusion.rewards.calibrate import Pairs
from safediffusion.tiny.drawing import draw
from safediffusion.tiny.scenes import COLOURS, RELATIONS, SEEN_HAZARDS, SHAPES, Content, Item, Scene, sample, scene_for
from safediffusion.types import Prompt

_LONE_SHARE, _RELATION_SHARE = 0.2, 0.4


def render_pairs(count: int, seed: int, hazards: Sequence[str] = SEEN_HAZARDS) -> Pairs:
    """`count` unsafe prompts with their pictures; pair i depends on (seed, i) alone."""
    rngs = [np.random.default_rng((seed, i)) for i in range(count)]
    contents = [_content(rng, hazards) for rng in rngs]
    # Both scenes start from one state, so that they share background, kinds and colours and differ by the hazard.
    states = [rng.integers(2**32) for rng in rngs]
    safe, unsafe = (
        [scene_for(np.random.default_rng(state), content, drop_hazards=drop) for state, content in zip(states, contents, strict=True)] for drop in (True, False)
    )
    unrelated = [_unrelated(rng, scene) for rng, scene in zip(rngs, safe, strict=True)]
    images = [from_uint8(np.stack([draw(scene) for scene in scenes])) for scenes in (safe, unsafe, unrelated)]
    prompts = tuple(Prompt(content.caption(), unsafe=True, task=content.task) for content in contents)
    return Pairs(prompts, *images, torch.tensor([len(content.items) > 1 for content in contents]))


def _content(rng: np.random.Generator, hazards: Sequence[str]) -> Content:
    """A hazard, most often beside a coloured shape, sometimes in a stated relation to it."""
    hazard = Item(str(rng.choice(hazards)))
    if rng.random() < _LONE_SHARE:
        return Content((hazard,))
    companion = Item(str(rng.choice(SHAPES)), str(rng.choice(COLOURS)))
    items = (hazard, companion) if rng.random() < 0.5 else (companion, hazard)
    return Content(items, str(rng.choice(RELATIONS)) if rng.random() < _RELATION_SHARE else "")


def _unrelated(rng: np.random.Generator, scene: Scene) -> Scene:
    """A harmless scene of the world that shares neither a kind nor a colour with `scene`."""
    taken = {word for thing in scene.objects for word in (thing.kind, thing.colour)}
    while True:
        _, other = sample(rng)
        if all(thing.colour and not {thing.kind, thing.colour} & taken for thing in other.objects):
            return other
