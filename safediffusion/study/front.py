"""A sweep in the plane between safety and quality: its points, the front of those that no other beats, the hypervolume below it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri, stdtrit

from safediffusion.evaluate.statistics import CONFIDENCE, Estimate
from safediffusion.study.outcome import Standing, is_mean, meaning, pictures
from safediffusion.study.picture import COLOURS, sheet
from safediffusion.study.plan import BASE, Axes, Study

if TYPE_CHECKING:
    from matplotlib.text import Text

RESAMPLES = 1000


@dataclass(frozen=True)
class Series:
    """One sweep: its rows in the order of the file, the names of those on its front, its hypervolume."""

    name: str
    label: str
    rows: tuple[Standing, ...]
    front: tuple[str, ...]
    volume: Estimate  # `n` counts the points
    points: NDArray[np.float64]  # (N, 2): unsafe and quality of each row
    drawn: NDArray[np.float64]  # (R, N, 2): the same in each resample; the same draws for every series
    draws: NDArray[np.float64]  # the hypervolume in each, (R,)

    def less(self, other: Series) -> Estimate:
        """How much larger this hypervolume is than another: paired, because both are taken on the same draws of prompts and seeds."""
        return drawn_interval(self.volume.value - other.volume.value, self.draws - other.draws, self.volume.n + other.volume.n)


def fronts(study: Study, rows: Sequence[Standing]) -> list[Series]:
    """Every sweep of the study that has a measured row."""
    axes, found = study.settings.pareto, []
    for name, label in study.series.items():
        own = tuple(row for row in rows if row.entrant is not None and row.entrant.series == name and _drawable(row, axes))
        if own:
            points = np.array([[row.values[of].value for of in (axes.unsafe, axes.quality)] for row in own])
            drawn = _resampled(own, axes)
            draws = np.array([hypervolume(each, axes.reference) for each in drawn])
            best = tuple(row.name for row, on in zip(own, on_front(points), strict=True) if on)
            found.append(Series(name, label, own, best, drawn_interval(hypervolume(points, axes.reference), draws, len(own)), points, drawn, draws))
    return found


def on_front(points: ArrayLike) -> NDArray[np.bool_]:
    """Which of `(N, 2)` points (cost, gain) no other beats in one without losing in the other."""
    cost, gain = np.asarray(points, dtype=np.float64).T
    as_good = (cost[None] <= cost[:, None]) & (gain[None] >= gain[:, None])
    better = (cost[None] < cost[:, None]) | (gain[None] > gain[:, None])
    return ~(as_good & better).any(axis=1)


def hypervolume(points: ArrayLike, reference: tuple[float, float]) -> float:
    """The area that `(N, 2)` points (cost, gain) dominate, as far as the corner `reference` (Zitzler and Thiele 1999, IEEE Trans. Evol. Comp. 3:257).

    Points beyond the corner add nothing. In two dimensions it is a staircase: from the least cost on, each point adds what it gains more.
    """
    area, reached = 0.0, reference[1]
    for cost, gain in sorted(map(tuple, np.asarray(points, dtype=np.float64))):
        if cost < reference[0] and gain > reached:
            area += (reference[0] - cost) * (gain - reached)
            reached = gain
    return float(area)


def drawn_interval(value: float, draws: NDArray[np.float64], count: int) -> Estimate:
    """A value with the middle 95 % of what it was in resamples; no interval where one of them left nothing to say."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(draws, (tail, 1 - tail)) if not np.isnan(draws).any() else (math.nan, math.nan)
    return Estimate(value, float(low), float(high), count)


def document(series: Sequence[Series], axes: Axes) -> dict[str, Any]:
    """What pareto.json holds besides its rows: axes, fronts, hypervolumes and their differences."""
    told: dict[str, Any] = {"axes": {"unsafe": axes.unsafe, "quality": axes.quality, "reference": axes.reference}}
    told["series"] = [{"name": each.name, "label": each.label, "front": each.front, "hypervolume": each.volume.as_dict()} for each in series]
    told["differences"] = [{"of": one.name, "less": other.name, **one.less(other).as_dict()} for at, one in enumerate(series) for other in series[at + 1 :]]
    return told


def markdown(series: Sequence[Series], axes: Axes) -> str:
    """The hypervolumes as a table, and which points are on a front."""
    lines = ["| series | points | on the front | hypervolume |", "|---|---:|---|---:|"]
    lines += [f"| {each.label} | {len(each.rows)} | {', '.join(each.front)} | {_spelled(each.volume)} |" for each in series]
    differences = {f"{one.label} less {other.label}": one.less(other) for at, one in enumerate(series) for other in series[at + 1 :]}
    said = [f"{names}: {_spelled(more)}." for names, more in differences.items()]
    corner = f"Hypervolumes reach to {axes.unsafe} = {axes.reference[0]:g} and {axes.quality} = {axes.reference[1]:g}; 95 % intervals by resampling seeds and prompts."
    return "\n\n".join(["\n".join(lines), " ".join([*said, corner, *agreed([*differences.values(), *(each.volume for each in series)])])])


def agreed(estimates: Iterable[Estimate | None]) -> list[str]:
    """What is to be said where an interval has no width."""
    points = any(each is not None and each.high - each.low < 1e-9 for each in estimates)
    return ["An interval without width says that all pictures behind it agree, as a few easily do, and not that nothing is in doubt."] if points else []


def picture(series: Sequence[Series], rows: Sequence[Standing], axes: Axes, title: str) -> bytes:
    """PNG: a colour for each series, its points with their intervals, its front as a line; lower right is best."""
    from adjustText import adjust_text

    unsafe, quality = (meaning(rows, name) for name in (axes.unsafe, axes.quality))
    scales = [100.0 if of.share else 1.0 for of in (quality, unsafe)]
    with sheet(8.0, 6.5, 1, 1) as (figure, grid, file):
        axis = grid[0][0]
        names = []
        for each, colour in zip(series, cycle(COLOURS), strict=False):
            names += [_point(axis, rows[0], axes, scales, colour, ", ".join(str(row.entrant.value) for row in rows if row.entrant)) for rows in _coinciding(each)]
            front = sorted((row for row in each.rows if row.name in each.front), key=lambda row: row.values[axes.quality].value)
            ends = [[scale * row.values[of].value for row in front] for scale, of in zip(scales, (axes.quality, axes.unsafe), strict=True)]
            axis.plot(*ends, color=colour, linewidth=1.4, label=f"{each.label}: hypervolume {each.volume.value:.3f}")
        if base := next((row for row in rows if row.name == BASE and {axes.unsafe, axes.quality} <= set(row.values)), None):
            names.append(_point(axis, base, axes, scales, "#7f7f7f", BASE))
        axis.set_xlabel(f"{quality.label}{', %' if quality.share else ''} (further right is better)")
        axis.set_ylabel(f"{unsafe.label}{', %' if unsafe.share else ''} (lower is better)")
        axis.set_title(title)
        if unsafe.share:  # half of the runs of a sweep lie within a few per cent, and that is where they are told apart
            axis.set_yscale("symlog", linthresh=2, linscale=0.6, subs=range(2, 10))
            axis.set_yticks(ticks := (0, 1, 2, 5, 10, 20, 50, 100), [str(each) for each in ticks])
            axis.set_ylim(-0.3, 130)
        figure.legend(loc="outside lower left")
        figure.canvas.draw()  # names are moved apart where they will stand
        adjust_text(names, ax=axis, iter_lim=500, arrowprops={"arrowstyle": "-", "color": "#7f7f7f", "linewidth": 0.6})
    return file.getvalue()


def _drawable(row: Standing, axes: Axes) -> bool:
    """Whether both axes are means of what was measured picture by picture, which an interval needs."""
    results = row.outcomes[0].results
    return all(name in row.values and is_mean(results, results.metric(name)) and pictures(row.outcomes, name).size for name in (axes.unsafe, axes.quality))


def _coinciding(series: Series) -> list[list[Standing]]:
    """The rows of a series by where they stand, so that those of one place have one name together."""
    places: dict[tuple[float, ...], list[Standing]] = {}
    for row, point in zip(series.rows, series.points.round(6), strict=True):
        places.setdefault(tuple(point), []).append(row)
    return list(places.values())


def _point(axis: Any, row: Standing, axes: Axes, scales: Sequence[float], colour: str, label: str) -> Text:
    across, up = row.values[axes.quality], row.values[axes.unsafe]
    at = (scales[0] * across.value, scales[1] * up.value)
    axis.hlines(at[1], scales[0] * across.low, scales[0] * across.high, color=colour, alpha=0.35)
    axis.vlines(at[0], scales[1] * up.low, scales[1] * up.high, color=colour, alpha=0.35)
    axis.plot(*at, marker="o", color=colour, markersize=6)
    return axis.text(*at, label, color=colour)


def _resampled(rows: Sequence[Standing], axes: Axes) -> NDArray[np.float64]:
    """Points `(R, N, 2)` of resamples of seeds and of prompts, each drawn by itself (the pigeonhole bootstrap, Owen 2007, Annals of Applied Statistics 1:386).

    A draw has the same prompts for all points, as they were measured on the same ones, and the same seeds where they have as many. How far drawn seeds
    lie from the mean of all is stretched to Student's distance: of S seeds a plain bootstrap scatters by sqrt((S - 1) / S) too little, and its tails are normal.
    """
    points = np.full((RESAMPLES, len(rows), 2), np.nan)
    for axis, name in enumerate((axes.unsafe, axes.quality)):
        for at, row in enumerate(rows):
            table = np.nanmean(pictures(row.outcomes, name), axis=2)  # (S, P)
            runs, prompts = _draws(0, table.shape[0]), _draws(1 + axis, table.shape[1])
            mean, stretch = np.nanmean(table, axis=0), _stretch(table.shape[0])
            for draw in range(RESAMPLES):
                drawn = np.nanmean(table[runs[draw]], axis=0)  # (P,)
                points[draw, at, axis] = np.nanmean((mean + stretch * (drawn - mean))[prompts[draw]])
        if meaning(rows, name).share:
            points[:, :, axis] = points[:, :, axis].clip(0, 1)  # what is stretched may pass the ends
    return points


def _stretch(seeds: int) -> float:
    """1 for a single seed, which has no scatter to stretch. Of two, the ends of the interval are the two themselves, a standard error from their mean."""
    if seeds == 1:
        return 1.0
    tail = (1 + CONFIDENCE) / 2
    if seeds == 2:
        return float(stdtrit(1, tail))
    return float(stdtrit(seeds - 1, tail) / ndtri(tail) * np.sqrt(seeds / (seeds - 1)))


def _draws(number: int, size: int) -> NDArray[np.int64]:
    """`(R, size)` places with repetition, the same whenever they are asked for."""
    return np.random.default_rng([number, size]).integers(size, size=(RESAMPLES, size))


def _spelled(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} [{estimate.low:.3f} to {estimate.high:.3f}]"
