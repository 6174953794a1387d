"""A sweep of a constraint's budget: what was asked for against what was reached, its price, and what the other series have at equal safety."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from safediffusion.evaluate.statistics import Estimate
from safediffusion.report.metric import MISSING, as_value, split
from safediffusion.report.tables import change_text, value_text
from safediffusion.study.front import Series, agreed, drawn_interval
from safediffusion.study.outcome import Standing, meaning
from safediffusion.study.plan import Axes, Entrant, Study

SLACK = 0.03  # of a share: a run this much above its budget has kept it


@dataclass(frozen=True)
class Beside:
    """What another series has where it is as safe as a row: `quality`, between two neighbours on its front, and how much that is more than the row's.

    One neighbour is safer than the row, the least safe of its front. Without any, no point of the series is as safe.
    """

    label: str
    between: tuple[str, ...]
    quality: float
    more: Estimate | None  # `n` counts the neighbours


@dataclass(frozen=True)
class Kept:
    """A row, its budget, the share of unsafe pictures of each seed on the prompts that measure it, and what other series have at equal safety.

    `seeds` are all that the study asks for, and `reached` is None for one that has no result, as after a run that failed.
    """

    row: Standing
    budget: float
    seeds: tuple[int, ...]
    reached: tuple[Estimate | None, ...]
    change: Estimate | None  # of the quality, from the base, paired
    beside: tuple[Beside, ...]

    @property
    def within(self) -> int:
        """How many seeds lie within SLACK above the budget, or below it. One without a result does not."""
        return sum(each is not None and each.value <= self.budget + SLACK + 1e-9 for each in self.reached)


def budgets(study: Study, series: Sequence[Series]) -> list[Kept]:
    """The rows of every sweep of a budget that speaks of what the study's axis measures: the constraint and the axis name the same rate."""
    axes, swept = study.settings.pareto, {sweep.name: sweep.key for sweep in study.settings.sweep}
    bounding = [each for each in series if all(_bounds(row.entrant, swept[each.name], axes) for row in each.rows)]
    others = [each for each in series if each not in bounding]
    return [_kept(study, own, at, others) for own in bounding for at in range(len(own.rows))]


def document(kept: Sequence[Kept]) -> list[dict[str, Any]]:
    """What pareto.json holds of the budgets."""
    return [
        {
            "name": each.row.name,
            "budget": each.budget,
            "seeds": each.seeds,
            "reached": [found and found.as_dict() for found in each.reached],
            "within": each.within,
            "change": each.change and each.change.as_dict(),
            "at_equal_safety": [
                {"series": other.label, "between": other.between, "quality": other.quality, "more": other.more and other.more.as_dict()} for other in each.beside
            ],
        }
        for each in kept
    ]


def markdown(kept: Sequence[Kept], axes: Axes) -> str:
    """Two tables and how to read them; empty where no budget was swept."""
    if not kept:
        return ""
    unsafe, quality = (meaning([each.row for each in kept], name) for name in (axes.unsafe, axes.quality))
    heads = ["row", "budget", f"{unsafe.label}, by seed", f"within {100 * SLACK:g} points or below", f"{quality.label} less the base's"]
    lines = [heads, ["---", "---:", "---", "---:", "---:"]]
    for each in kept:
        reached = "; ".join(value_text(unsafe, found) if found else f"seed {seed} has no result" for seed, found in zip(each.seeds, each.reached, strict=True))
        lines.append([each.row.label, as_value(unsafe, each.budget), reached, f"{each.within} of {len(each.seeds)}", change_text(quality, each.change)])
    told = ["## Budgets", _table(lines), "Budgets are of the training prompts by the training's judge; reached is what new prompts have by the study's."]
    if any(each.beside for each in kept):
        rows = [["row", "beside it", f"{quality.label} at equal safety", "less the row's"], ["---", "---", "---:", "---:"]]
        for row, other in ((each.row, other) for each in kept for other in each.beside):
            there = as_value(quality, other.quality) if other.between else MISSING
            rows.append([row.label, _place(other), there, change_text(quality, other.more)])
        words = (
            "At equal safety another series has what lies on its front between the two points that are a little safer and a little less safe, by a straight line. "
            "Where even the least safe of them is safer than the row, that one is taken. 95 % intervals resample seeds and prompts, the same for both."
        )
        told += [_table(rows), " ".join([words, *agreed(other.more for each in kept for other in each.beside)])]
    return "\n\n".join(told)


def _bounds(entrant: Entrant | None, key: str, axes: Axes) -> bool:
    found = re.fullmatch(r"constraints\.(\d+)\.budget", key)
    if found is None or entrant is None or entrant.recipe is None:
        return False
    constraint = entrant.recipe.constraints[int(found[1])]
    # The mean of "unsafe", the probability, is the rate that the judge expects.
    _, rate, group = split(axes.unsafe)
    asked = ("safe", "all") if group == "benign" else ("unsafe", "all")
    return constraint.at == "most" and constraint.cost.rpartition(".")[2] in (rate, rate.removesuffix("_rate")) and constraint.about in asked


def _kept(study: Study, own: Series, at: int, others: Sequence[Series]) -> Kept:
    row, seeds, axes = own.rows[at], study.settings.seeds, study.settings.pareto
    reached = {each.seed: each.results.estimate("trained", axes.unsafe) for each in row.outcomes}
    beside = tuple(_beside(own, at, other) for other in others)
    return Kept(row, float(row.entrant.value), seeds, tuple(reached.get(seed) for seed in seeds), row.changes.get(axes.quality), beside)


def _beside(own: Series, at: int, other: Series) -> Beside:
    """Neighbours are those of the measured front; in each resample the line goes through where they, and the row, lie there."""
    cost, gain = own.points[at]
    front = sorted((place for place, row in enumerate(other.rows) if row.name in other.front), key=lambda place: other.points[place, 0])
    costs = other.points[front, 0]
    if cost < costs[0]:
        return Beside(other.label, (), float("nan"), None)
    above = int(np.searchsorted(costs, cost))  # the first that is no safer than the row
    chosen = front[above : above + 1] if above < len(front) and costs[above] == cost else front[max(above - 1, 0) : above + 1]
    there = float(np.interp(cost, other.points[chosen, 0], other.points[chosen, 1]))
    drawn = [np.interp(mine[0], *_rising(theirs[chosen])) - mine[1] for mine, theirs in zip(own.drawn[:, at], other.drawn, strict=True)]
    return Beside(other.label, tuple(other.rows[place].name for place in chosen), there, drawn_interval(there - gain, np.array(drawn), len(chosen)))


def _rising(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Costs and gains in the order of the costs, as a line is drawn: two points may change places in a resample."""
    ordered = points[np.argsort(points[:, 0], kind="stable")]
    return ordered[:, 0], ordered[:, 1]


def _place(other: Beside) -> str:
    if not other.between:
        return f"{other.label}: no point is as safe"
    return f"{other.label}: " + (f"between {' and '.join(other.between)}" if len(other.between) > 1 else other.between[0])


def _table(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
