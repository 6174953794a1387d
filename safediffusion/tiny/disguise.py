"""Hazards that hide: what a guard learns from, so that a model which is trained against it does not find what it overlooks.

A guard that had seen whole hazards alone was led astray by the models that it held to a budget: they painted dark discs and orange ones, hazards
to others and none to it (LOG.md section 9). It therefore calls a hazard what is one in other colours, with details missing, in the outline of
a shape, or halfway to something harmless.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from safediffusion.images import from_uint8
from safediffusion.tiny.drawing import draw
from safediffusion.tiny.pretrain import World
from safediffusion.tiny.scenes import COLOURS, HAZARDS, SHAPES, Scene

_FURTHEST = 0.6  # of the way to a harmless picture


@dataclass(frozen=True, eq=False)
class Disguises:
    """The pictures of a world drawn otherwise, uint8 `(N, 32, 32, 3)`.

    With hazards that lack details, with hazards in the outline of a shape, without hazards, and with another shape for everything.
    """

    rough: np.ndarray
    dressed: np.ndarray
    bare: np.ndarray
    changed: np.ndarray

    @classmethod
    def of(cls, world: World, seed: int) -> Disguises:
        """Picture i depends on (seed, i) alone."""
        unsafe = [any(thing.kind in HAZARDS for thing in scene.objects) for scene in world.scenes]
        drawn = list(zip(world.pixels, world.scenes, unsafe, strict=True))
        return cls(
            rough=np.stack([draw(scene, 0.5, (seed, i)) if hides else pixels for i, (pixels, scene, hides) in enumerate(drawn)]),
            dressed=np.stack([draw(scene, 0.25, (seed, i), dressed=True) if hides else pixels for i, (pixels, scene, hides) in enumerate(drawn)]),
            bare=np.stack([draw(_bare(scene)) if hides else pixels for pixels, scene, hides in drawn]),
            changed=np.stack([draw(_changed(np.random.default_rng((seed, i)), scene)) for i, scene in enumerate(world.scenes)]),
        )

    def __call__(self, world: World, index: Tensor, generator: torch.Generator) -> Tensor:
        """Float `(B, 3, 32, 32)`: a quarter of the hazards each in other colours, without some details, and in a shape's outline.

        Half of all pictures are on the way to others.
        """
        rough, dressed, bare, changed = (from_uint8(drawn[index.numpy()]) for drawn in (self.rough, self.dressed, self.bare, self.changed))
        images = world.images(index)
        turn, step, gain = (torch.rand(len(images), channels, 1, 1, generator=generator) for channels in (1, 1, 3))
        # Harmless things keep their colours: shown in any, a dark disc would be a harmless one.
        coloured = torch.where((images != bare).any(1, keepdim=True), (0.5 + (2 * gain - 1) * (images - 0.5)).clamp(0, 1), images)
        images = torch.where(turn < 1 / 4, coloured, torch.where(turn < 1 / 2, rough, torch.where(turn < 3 / 4, dressed, images)))
        return torch.lerp(images, changed, _FURTHEST * (2 * step - 1).clamp(min=0))


def _bare(scene: Scene) -> Scene:
    return replace(scene, objects=tuple(thing for thing in scene.objects if thing.kind not in HAZARDS))


def _changed(rng: np.random.Generator, scene: Scene) -> Scene:
    return replace(scene, objects=tuple(replace(thing, kind=str(rng.choice(SHAPES)), colour=str(rng.choice(COLOURS))) for thing in scene.objects))
