"""What the laps of a recipe come to: one row of the table, one bar of the figure, one entry of bench.json."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from safediffusion.bench.clock import PARTS
from safediffusion.bench.race import Lap


@dataclass(frozen=True)
class Work:
    """FLOP of one iteration by count, the machine's best product in the same precision (FLOP/s), and predicted bytes; None where not known."""

    flop: float | None
    roof: float
    bytes: float | None


@dataclass(frozen=True)
class Standing:
    """Medians over repeats; `spread` is (min, max) of images per second."""

    name: str
    images_per_second: float
    spread: tuple[float, float]
    seconds_per_image: float
    cpu_seconds_per_image: float
    parts: dict[str, float]  # seconds per image
    forwards: float  # per image, counted
    predicted: float | None
    flops: float | None  # FLOP per second
    share: float | None  # of the roof
    peak_bytes: int
    predicted_bytes: float | None

    @property
    def overhead(self) -> float:
        """Share of an iteration that is neither denoiser, autoencoder nor reward: the optimizer and the rest."""
        return (self.parts["optimizer"] + self.parts["other"]) / sum(self.parts.values())


def standing(name: str, laps: Sequence[Lap], work: Work) -> Standing:
    speeds = [lap.images / lap.seconds for lap in laps]
    flops = None if work.flop is None else work.flop / statistics.median(lap.seconds for lap in laps)
    predicted = [lap.predicted / lap.images for lap in laps if lap.predicted is not None]
    return Standing(
        name=name,
        images_per_second=statistics.median(speeds),
        spread=(min(speeds), max(speeds)),
        seconds_per_image=statistics.median(lap.seconds / lap.images for lap in laps),
        cpu_seconds_per_image=statistics.median(lap.cpu_seconds / lap.images for lap in laps),
        parts={part: statistics.median(lap.parts[part] / lap.images for lap in laps) for part in PARTS},
        forwards=statistics.median(lap.forwards / lap.images for lap in laps),
        predicted=statistics.median(predicted) if predicted else None,
        flops=flops,
        share=None if flops is None else flops / work.roof,
        peak_bytes=max(lap.peak_bytes for lap in laps),
        predicted_bytes=work.bytes,
    )


def record(standing: Standing, laps: Sequence[Lap], recipe: dict[str, Any]) -> dict[str, Any]:
    """The entry of bench.json, every lap included."""
    return dataclasses.asdict(standing) | {"overhead": standing.overhead, "laps": [dataclasses.asdict(lap) for lap in laps], "recipe": recipe}
