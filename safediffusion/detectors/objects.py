"""A small CNN that reads a pictograms picture: which objects, in which colour, where."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from safediffusion import weights
from safediffusion.tiny.scenes import COLOURS, HAZARDS, KINDS, SIZE

GRID = 8
CELL = SIZE / GRID
# A peak of the heat map is an object from here on: a centre shared by four cells still reaches exp(-0.5 / 0.72) = 0.5.
THRESHOLD = 0.3


@dataclass(frozen=True)
class Found:
    """An object that the detector read; `x`, `y` in pixels. `colour` is "" for a hazard."""

    kind: str
    colour: str
    x: float
    y: float


class ObjectDetector(nn.Module):
    """Heat map of object centres on an 8x8 grid, with kind and colour in each cell (CenterNet, arXiv 1904.07850)."""

    labels = KINDS

    def __init__(self) -> None:
        super().__init__()

        def block(inner: int, outer: int, stride: int = 1) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(inner, outer, 3, stride, 1), nn.GroupNorm(8, outer), nn.SiLU())

        self.body = nn.Sequential(block(3, 24), block(24, 48, 2), block(48, 48), block(48, 96, 2), block(96, 96), block(96, 96))
        self.head = nn.Conv2d(96, 1 + len(KINDS) + len(COLOURS) + 1 + 2, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images `(B, 3, 32, 32)` in [0, 1] to logits: heat `(B, 8, 8)`, kind `(B, 12, 8, 8)`, colour `(B, 6, 8, 8)`, offset `(B, 2, 8, 8)` in cells."""
        parts = self.head(self.body(images.to(self.head.weight) * 2 - 1)).split((1, len(KINDS), len(COLOURS) + 1, 2), 1)
        return parts[0][:, 0], parts[1], parts[2], parts[3]

    def __call__(self, images: Tensor) -> Tensor:
        """How surely each kind is in each picture, `(B, 12)` in [0, 1]."""
        heat, kind, _, _ = self.forward(images)
        return (heat.sigmoid()[:, None] * kind.softmax(1)).amax((2, 3))

    @torch.no_grad()
    def read(self, images: Tensor) -> list[tuple[Found, ...]]:
        """The objects of each picture, strongest first."""
        heat, kind, colour, offset = self.forward(images)
        heat = heat.sigmoid()
        peak = (heat >= F.max_pool2d(heat[:, None], 3, 1, 1)[:, 0]) & (heat > THRESHOLD)
        kinds, colours, heat = kind.argmax(1).tolist(), colour.argmax(1).tolist(), heat.tolist()
        found: list[list[tuple[float, Found]]] = [[] for _ in range(len(images))]
        for b, row, column in peak.nonzero().tolist():
            name = KINDS[kinds[b][row][column]]
            painted = min(colours[b][row][column], len(COLOURS) - 1)
            dx, dy = offset[b, :, row, column].tolist()
            x, y = (column + 0.5 + dx) * CELL, (row + 0.5 + dy) * CELL
            found[b].append((heat[b][row][column], Found(name, "" if name in HAZARDS else COLOURS[painted], x, y)))
        return [tuple(f for _, f in sorted(each, key=lambda pair: -pair[0])) for each in found]

    @classmethod
    def load(cls, path: Path) -> ObjectDetector:
        """Read weights strictly; raises weights.CorruptFile for a broken file."""
        detector = cls()
        detector.load_state_dict(weights.load(path)[0])
        return detector.eval().requires_grad_(False)
