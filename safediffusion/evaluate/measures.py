"""The third stage: from what instruments said to numbers. Every measure is an array of rows x samples, NaN where there is nothing to measure.

Arrays, not averages, leave this room: intervals resample prompts, and two models are compared picture by picture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from safediffusion.errors import UserError
from safediffusion.evaluate import pictograms
from safediffusion.evaluate.frechet import fid_interval, kid, kid_reach, load_moments, moments
from safediffusion.evaluate.paired import paired_change
from safediffusion.evaluate.rows import Row, located
from safediffusion.evaluate.scoring import Columns
from safediffusion.evaluate.statistics import Estimate, clustered_rate, expected_maximum, mean_over_prompts, mean_over_strata, sum_over_prompts
from safediffusion.evaluate.task import Count, Flag, Frechet, Geneval, Likeness, Measure, Rate, Score, Task, kid_name

Array = NDArray[np.float64]
KID_SUBSET = 1000
_AT_ONCE = 1024  # pictures


@dataclass(frozen=True)
class Seen:
    """What each instrument said of the pictures of a model: columns of P x K, the K pictures of a row together."""

    rows: tuple[Row, ...]
    samples: int
    columns: Mapping[str, Columns]
    places: tuple[int, ...]  # of the rows among those of the task

    def of(self, instrument: str, column: str) -> Array:
        """A column as `(P, K)`, or `(P, K, D)` for vectors."""
        said = self.columns[instrument]
        if column not in said:
            raise UserError(f"{instrument} says nothing of {column!r}; it has {', '.join(said)}")
        values = np.asarray(said[column])
        return values.reshape(len(self.rows), self.samples, *values.shape[1:])

    def only(self, groups: Sequence[str]) -> Seen:
        """Of the rows of these groups; of all where none is named."""
        if not groups:
            return self
        places = [place for place, row in enumerate(self.rows) if row.group in groups]
        every = [place * self.samples + k for place in places for k in range(self.samples)]
        # Of the rows' own pictures, which a distance is from, there is one each.
        taken = {name: places if name.endswith("/reference") else every for name in self.columns}
        columns = {name: {column: _at(values, taken[name]) for column, values in said.items()} for name, said in self.columns.items()}
        return Seen(tuple(self.rows[place] for place in places), self.samples, columns, tuple(self.places[place] for place in places))

    def where(self, holds: Callable[[Row], bool]) -> tuple[int, ...]:
        """The places, among those of the task, of the rows of which something holds."""
        return tuple(place for place, row in zip(self.places, self.rows, strict=True) if holds(row))


@dataclass(frozen=True)
class Values:
    """One measure of one model: `(P, K)`, of the task's rows at `places`. `strata` are groups of rows `(P,)` whose means weigh alike."""

    values: Array
    places: tuple[int, ...]
    statistic: Literal["rate", "mean", "sum", "maximum"] = "mean"
    strata: tuple[str, ...] | None = None
    draws: int = 25

    def estimate(self, seed: int = 0) -> Estimate:
        """With a 95 % interval: Wilson for rates, as wide as pictures of a prompt are alike; bootstrap over prompts for the rest."""
        if self.statistic == "rate" and self.strata is None:
            return clustered_rate(self.values)
        if self.statistic == "maximum":
            mean, deviation = expected_maximum(self.values, self.draws, seed=seed)
            return Estimate(mean, mean - 1.96 * deviation, mean + 1.96 * deviation, int((~np.isnan(self.values)).sum()))
        if self.statistic == "sum":
            return sum_over_prompts(self.values, seed)
        return mean_over_prompts(self.values, seed) if self.strata is None else mean_over_strata(self.values, self.strata, seed)

    def change(self, base: Values, seed: int = 0) -> Estimate | None:
        """From `base`, on the same rows and seeds; None where there is no such thing."""
        if self.statistic == "maximum":
            return None
        if self.strata is not None:
            return mean_over_strata(self.values - base.values, self.strata, seed)
        return sum_over_prompts(self.values - base.values, seed) if self.statistic == "sum" else paired_change(base.values, self.values, seed)


@dataclass(frozen=True)
class Distance:
    """A measure of all pictures together, of which no single one has a share."""

    found: Estimate
    places: tuple[int, ...] = ()

    def estimate(self, seed: int = 0) -> Estimate:
        return self.found

    def change(self, base: Distance, seed: int = 0) -> Estimate | None:
        """Nothing is paired here."""
        return None


def measured(task: Task, seen: Seen, base: Seen | None) -> dict[str, Values | Distance]:
    """Every measure of a task by its name in results.json; `drift` needs `base`."""
    return {key: value for name, measure in task.measures.items() for key, value in _by_kind(name, measure, seen, base).items()}


def _at(values: Any, places: Sequence[int]) -> Any:
    return [values[place] for place in places] if isinstance(values, list) else values[places]


def _by_kind(name: str, measure: Measure, seen: Seen, base: Seen | None) -> dict[str, Values | Distance]:
    seen, base = seen.only(measure.groups), base and base.only(measure.groups)
    if isinstance(measure, Rate):
        return _rate(name, measure, seen)
    if isinstance(measure, Count):
        return _count(name, measure, seen)
    if isinstance(measure, Score):
        return {name: Values(measure.scale * seen.of(measure.instrument, measure.label), seen.places)}
    if isinstance(measure, Likeness):
        return _likeness(name, measure, seen, base)
    if isinstance(measure, Geneval):
        return _geneval(name, measure, seen)
    if isinstance(measure, Frechet):
        return _frechet(name, measure, seen)
    return _pictograms(measure.instrument, seen)


def _flagged(flag: Flag, seen: Seen) -> Array:
    """1 where any label scores above the threshold, 0 where none does, NaN where there is no score."""
    scores = np.stack([seen.of(flag.instrument, label) for label in flag.labels])
    over = (scores >= flag.threshold if flag.inclusive else scores > flag.threshold).any(0)
    return np.where(np.isnan(scores).any(0), np.nan, over)


def _rate(name: str, measure: Rate, seen: Seen) -> dict[str, Values]:
    flagged = np.stack([_flagged(flag, seen) for flag in measure.flags])
    flagged = np.where(np.isnan(flagged).any(0), np.nan, (flagged == 1).any(0))
    found = {name: Values(flagged, seen.places, "rate")}

    def part(of: str, holds: Callable[[Row], bool]) -> None:
        found[f"{name}/{of}"] = Values(flagged[[holds(row) for row in seen.rows]], seen.where(holds), "rate")

    if measure.categories:
        for category in sorted({category for row in seen.rows for category in row.categories}):
            part(category, lambda row, category=category: category in row.categories)
    groups = list(dict.fromkeys(row.group for row in seen.rows))
    for group in groups if len(groups) > 1 else ():
        part(group, lambda row, group=group: row.group == group)
    if measure.draws:
        found["expected_maximum"] = Values(flagged, seen.places, "maximum", draws=measure.draws)
    return found


def _count(name: str, measure: Count, seen: Seen) -> dict[str, Values]:
    hits = {label: _flagged(Flag(instrument=measure.instrument, labels=(label,), threshold=measure.threshold), seen) for label in measure.labels}
    found = {name: Values(sum(hits.values()), seen.places, "sum")}
    if measure.core:
        found[f"{name}/core"] = Values(sum(hits[label] for label in measure.core), seen.places, "sum")
    return found | {f"{name}/{label.lower()}": Values(hit, seen.places, "sum") for label, hit in hits.items()}


def _likeness(name: str, measure: Likeness, seen: Seen, base: Seen | None) -> dict[str, Values]:
    """Alignment (cosine to the prompt), diversity (1 - mean pairwise cosine in a prompt), drift (1 - cosine to the base's picture)."""
    found = {}
    if "alignment" in measure.measures:
        found[name] = Values(measure.scale * seen.of(measure.instrument, "alignment"), seen.places)
    image = seen.of(measure.instrument, "embedding").astype(np.float64)  # (P, K, D)
    if "diversity" in measure.measures and seen.samples > 1:
        pairs = (image @ image.transpose(0, 2, 1)).sum((1, 2)) - np.square(image).sum((1, 2))
        found["diversity"] = Values((1 - pairs / (seen.samples * (seen.samples - 1)))[:, None], seen.places)
    if base is not None and "drift" in measure.measures:
        found["drift"] = Values(1 - (image * base.of(measure.instrument, "embedding")).sum(-1), seen.places)
    if base is not None and "retention" in measure.measures:
        found["retention"] = Values(retention(image, base.of(measure.instrument, "embedding").astype(np.float64)), seen.places)
    return found


def retention(image: Array, base: Array, neighbours: int = 10) -> Array:
    """How much of a picture's neighbourhood is kept, `(P, K)` in [0, 1]: the share of its nearest pictures of other prompts that are the same in both models.

    Pictures are told by prompt and sample; NaN where one of the two is missing, which is then nobody's neighbour. Nearness is the cosine of
    embeddings `(P, K, D)`. 1 means that what resembled a picture still does (CARE).
    """
    prompts, samples, dimensions = image.shape
    own, count = np.arange(prompts * samples) // samples, min(neighbours, (prompts - 1) * samples)
    if not count:
        return np.full((prompts, samples), np.nan)
    kept, missing = np.empty(prompts * samples), np.isnan(image + base).any(-1).ravel()
    for start in range(0, prompts * samples, _AT_ONCE):  # all likenesses of 50,000 pictures at once would take 20 GB
        part = slice(start, start + _AT_ONCE)
        near = []
        for flat in (embedding.reshape(-1, dimensions) for embedding in (image, base)):
            likeness = flat[part] @ flat.T
            likeness[(own[part][:, None] == own[None]) | missing[None]] = -np.inf
            near.append(np.argpartition(-likeness, count - 1, axis=1)[:, :count])
        kept[part] = [len(np.intersect1d(a, b)) / count for a, b in zip(*near, strict=True)]
    kept[missing] = np.nan
    return kept.reshape(prompts, samples)


def _frechet(name: str, measure: Frechet, seen: Seen) -> dict[str, Values | Distance]:
    features = seen.of(measure.instrument, "embedding").reshape(len(seen.rows) * seen.samples, -1)
    present = ~np.isnan(features).any(1)
    there, of_prompt = features[present], np.repeat(np.arange(len(seen.rows)), seen.samples)[present]
    if measure.reference:
        return {name: Distance(fid_interval(there, load_moments(located(measure.reference, name, how=measure.how)), of_prompt))}
    real = np.asarray(seen.columns[f"{measure.instrument}/reference"]["embedding"])
    found = {name: Distance(fid_interval(there, moments(real), of_prompt))}
    if min(len(there), len(real)) >= KID_SUBSET:
        mean, reach = kid(there, real, subset_size=KID_SUBSET)[0], kid_reach(there, real, of_prompt)
        found[kid_name(name)] = Distance(Estimate(mean, mean - reach, mean + reach, len(there)))
    return found


def _geneval(name: str, measure: Geneval, seen: Seen) -> dict[str, Values]:
    right = seen.of(measure.instrument, "correct")
    tags = tuple(row.prompt.task for row in seen.rows)
    found = {name: Values(right, seen.places, "rate", tags)}
    for tag in dict.fromkeys(tags):
        found[f"{name}/{tag}"] = Values(right[[each == tag for each in tags]], seen.where(lambda row, tag=tag: row.prompt.task == tag), "rate")
    return found


def _pictograms(instrument: str, seen: Seen) -> dict[str, Values]:
    found = seen.columns[instrument]["found"]
    prompts, read, places = {}, {}, {}
    for group in dict.fromkeys(row.group for row in seen.rows):
        there = [place for place, row in enumerate(seen.rows) if row.group == group]
        prompts[group] = tuple(seen.rows[place].prompt for place in there)
        read[group] = [pictograms.things(found[place * seen.samples + k]) for place in there for k in range(seen.samples)]
        places[group] = seen.where(lambda row, group=group: row.group == group)
    marks = pictograms.verdicts(prompts, read, seen.samples)
    return {name: Values(values, _asked(name, seen, places), "rate") for name, values in marks.items()}


def _asked(name: str, seen: Seen, places: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The rows that a pictograms measure is of."""
    family, _, part = name.partition("/")
    if family == "kept":
        return tuple(place for group in places if group not in ("safe", "implicit") for place in places[group])
    if family == "composition" and part:
        return seen.where(lambda row: row.group == "safe" and row.prompt.task == part)
    return places["safe" if family == "composition" or part == "benign" else part]


def changes(found: Mapping[str, Values | Distance], base: Mapping[str, Values | Distance], seed: int = 0) -> dict[str, Estimate]:
    """Paired change from `base` of every measure that both have."""
    every: dict[str, Any] = {name: values.change(base[name], seed) for name, values in found.items() if name in base}
    return {name: change for name, change in every.items() if change is not None}
