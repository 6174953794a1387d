"""Changes between any two models, paired over prompts and seeds: from `scores.jsonl`, which has a line for every picture."""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from safediffusion.evaluate.paired import holm, paired_change, paired_p_value
from safediffusion.evaluate.statistics import Estimate, mean_over_strata, sum_over_prompts

if TYPE_CHECKING:
    from safediffusion.report.metric import Metric
    from safediffusion.report.results import Results

Prompt = tuple[str, str]  # the task, and the id that the prompt has there
_ABOUT = {"model", "task", "id", "group", "prompt", "sample", "sha256"}  # of a line; what else it has are measures


@dataclass(frozen=True)
class Paired:
    """Changes of one model from the reference, and Holm's p-values of the parts of a total."""

    changes: dict[str, Estimate]
    p_values: dict[str, float] = field(default_factory=dict)


class Scores:
    """What the pictures of one model scored. Three numbers are kept of each: 50,000 pictures take some megabytes."""

    def __init__(self) -> None:
        self.groups: dict[Prompt, str] = {}
        self._places: dict[Prompt, int] = {}
        self._columns: dict[str, tuple[array[int], array[int], array[float]]] = {}  # by measure: place of the prompt, sample, value

    def add(self, line: Mapping[str, Any], several: bool) -> None:
        """One line; raises KeyError or TypeError for one that is none of ours."""
        prompt, sample = (line["task"], line["id"]), int(line["sample"])
        place = self._places.setdefault(prompt, len(self._places))
        self.groups[prompt] = line["group"]
        for name, value in line.items():
            if name not in _ABOUT and value is not None:
                places, samples, values = self._columns.setdefault(f"{line['task']}:{name}" if several else name, (array("q"), array("q"), array("d")))
                places.append(place)
                samples.append(sample)
                values.append(value)

    def table(self, name: str) -> tuple[list[Prompt], NDArray[np.float64]]:
        """The prompts that were measured, in the order of the file, and `(P, K)` values, NaN where there is none."""
        if name not in self._columns:
            return [], np.empty((0, 0))
        places, samples, values = (np.array(column) for column in self._columns[name])
        there, row = np.unique(places, return_inverse=True)
        table = np.full((len(there), samples.max() + 1), np.nan)
        table[row, samples] = values
        prompts = list(self._places)
        return [prompts[place] for place in there], table


def read_scores(path: Path, several: bool) -> dict[str, Scores]:
    """The scores of every model of a `scores.jsonl`, read line by line; `several` puts the task before each name, as in results.json.

    What a crash or an editor has cut is left out, as a picture without a measure is.
    """
    found: dict[str, Scores] = {}
    with open(path, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                record = json.loads(line)
                found.setdefault(record["model"], Scores()).add(record, several)
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
    return found


def changes_of(results: Results, scores: Mapping[str, Scores]) -> dict[str, Paired]:
    """The changes of every model from the reference, where the scores of both are there."""
    base = scores.get(results.reference)
    found: dict[str, Paired] = {}
    for model in results.columns[1:]:
        if base is None or model not in scores:
            continue
        found[model] = Paired({})
        for of in results.metrics(name for name in results.models[model] if name in results.models[results.reference]):
            prompts, before, after = _aligned(base, scores[model], of.name)
            if not prompts or of.family == "expected_maximum":  # nothing is paired in a maximum
                continue
            counts = [each.n for each in (results.estimate(results.reference, of.name), results.estimate(model, of.name)) if each]
            found[model].changes[of.name] = _change(results, of, before, after, [base.groups[prompt] for prompt in prompts], min(counts, default=0))
            if of.part and _is_rate(before, after):
                found[model].p_values[of.name] = paired_p_value(before, after)
    return _corrected(results, found)


def _aligned(base: Scores, other: Scores, name: str) -> tuple[list[Prompt], NDArray[np.float64], NDArray[np.float64]]:
    """The prompts that both were measured on, and their values `(P, K)` in the same places."""
    (prompts, before), (theirs, after) = base.table(name), other.table(name)
    at = {prompt: place for place, prompt in enumerate(theirs)}
    shared = [place for place, prompt in enumerate(prompts) if prompt in at]
    samples = min(before.shape[1], after.shape[1])
    return [prompts[place] for place in shared], before[shared, :samples], after[[at[prompts[place]] for place in shared], :samples]


def _change(results: Results, of: Metric, before: NDArray[np.float64], after: NDArray[np.float64], groups: Sequence[str], count: int) -> Estimate:
    """`count` is the number of measurements of the models: a measure of a whole prompt stands in the line of each of its pictures."""
    kind = results.kind(of.name)
    if kind == "count" or of.family == "detections":
        return sum_over_prompts(after - before, seed=0)
    if kind == "geneval" and not of.part:
        found = mean_over_strata(after - before, groups, seed=0)
    else:
        found = paired_change(before, after, seed=0)
    return replace(found, n=min(found.n, count))


def _is_rate(*values: NDArray[np.float64]) -> bool:
    return all(np.isin(each[~np.isnan(each)], (0, 1)).all() for each in values)


def _corrected(results: Results, found: Mapping[str, Paired]) -> dict[str, Paired]:
    """P-values adjusted for all parts of a total, of all models together: so many were looked at."""
    families: dict[str, list[tuple[str, str]]] = {}
    for model, each in found.items():
        for of in results.metrics(results.models[model]):
            if of.name in each.p_values:
                families.setdefault(of.total, []).append((model, of.name))
    for members in families.values():
        adjusted = holm([found[model].p_values[name] for model, name in members])
        for (model, name), p_value in zip(members, adjusted, strict=True):
            found[model].p_values[name] = float(p_value)
    return dict(found)
