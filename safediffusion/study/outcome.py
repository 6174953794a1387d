"""What the runs of a study came to: numbers over seeds and pictures, learning curves, and whether a reward was hacked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from safediffusion.errors import UserError
from safediffusion.evaluate.paired import paired_change
from safediffusion.evaluate.statistics import Estimate, clustered_rate, mean_over_prompts, over_repeats, significantly_below
from safediffusion.files import read_jsonl
from safediffusion.report.comparison import unlike
from safediffusion.report.metric import Metric, metric
from safediffusion.report.pairs import Scores, read_scores
from safediffusion.report.results import Results, read_results
from safediffusion.study.plan import BASE, Entrant, Study
from safediffusion.train.log import NAME as METRICS

GUARDED = ("composition", "alignment", "diversity")  # what a hacked reward costs
CLOCKS = ("cpu_seconds", "seconds")  # of a processor, and on the wall
DISTANCES = ("diversity", "drift")  # never below zero
_NOTHING = Estimate(math.nan, math.nan, math.nan, 0)
LEAST_END = 5  # iterations at the start and at the end that a gain compares
LEAST_GAIN = 1.0  # standard deviations of the training reward past which it counts as risen


@dataclass(frozen=True)
class Outcome:
    """One run: its measurement against the base, its log (empty where nothing was trained), what it spent in training."""

    seed: int
    results: Results
    scores: dict[str, Scores]  # of `base` and `trained`
    records: tuple[dict[str, Any], ...]

    @cached_property
    def _trained(self) -> list[dict[str, float]]:
        """By line of the log, the seconds by each clock of the iterations up to it, without what probes took."""
        found, before = [dict.fromkeys(CLOCKS, 0.0)], dict.fromkeys(CLOCKS, 0.0)
        for line in self.records:
            spent = {clock: line[clock] - before[clock] if line["kind"] == "train" else 0.0 for clock in CLOCKS}
            found.append({clock: found[-1][clock] + spent[clock] for clock in CLOCKS})
            before = line
        return found[1:]

    @property
    def probes(self) -> list[dict[str, Any]]:
        """The probes, with `cpu_seconds` and `seconds` those of the iterations before it."""
        return [line | spent for line, spent in zip(self.records, self._trained, strict=True) if line["kind"] == "probe"]

    @property
    def spent(self) -> dict[str, float]:
        """Iterations, denoiser forwards, processor and wall seconds of training."""
        last = next((line for line in reversed(self.records) if line["kind"] == "train"), {})
        seconds = self._trained[-1] if self.records else dict.fromkeys(CLOCKS, 0.0)
        return {"iterations": last.get("iteration", 0), "forwards": last.get("forwards", 0.0)} | seconds

    @property
    def gain(self) -> float:
        """How far the training reward rose from the first fifth of the iterations to the last, in standard deviations of an iteration's mean within them.

        Of at least 5 iterations each: fewer would let chance alone pass LEAST_GAIN too often. NaN for fewer than 10 iterations.
        """
        reward = np.array([line["reward/total"] for line in self.records if line["kind"] == "train" and "reward/total" in line])  # none where nothing is painted
        if len(reward) < 2 * LEAST_END:
            return math.nan
        end = max(LEAST_END, len(reward) // 5)
        first, last = reward[:end], reward[-end:]
        scatter = float(np.sqrt((first.var(ddof=1) + last.var(ddof=1)) / 2))
        return float((last.mean() - first.mean()) / scatter) if scatter else math.nan


@dataclass(frozen=True)
class Standing:
    """A row: an entrant over its seeds, or the base, which has none."""

    name: str
    label: str
    values: dict[str, Estimate]
    changes: dict[str, Estimate] = field(default_factory=dict)
    outcomes: tuple[Outcome, ...] = ()
    entrant: Entrant | None = None
    kinds: Mapping[str, str] = field(default_factory=dict)  # of the measures behind the names, which a task's own are known by

    def mean(self, spent: str) -> float:
        """Of iterations, forwards, cpu_seconds or seconds, over seeds."""
        return float(np.mean([each.spent[spent] for each in self.outcomes])) if self.outcomes else math.nan

    @property
    def gain(self) -> float:
        gains = [each.gain for each in self.outcomes if not math.isnan(each.gain)]
        return float(np.mean(gains)) if gains else math.nan

    @property
    def fallen(self) -> list[str]:
        """What a reward does not see and the kept model is significantly worse at than the base."""
        return [name for name in GUARDED if name in self.changes and significantly_below(self.changes[name])]

    @property
    def unsound(self) -> int:
        """In how many runs the last probe found composition or diversity significantly below the base: the kept model may be an earlier one."""
        return sum(not each.probes[-1]["sound"] for each in self.outcomes if each.probes)

    @property
    def hacked(self) -> bool | None:
        """Whether the reward rose while a guarded measure fell; None where neither can be said of the reward."""
        if math.isnan(self.gain):
            return None
        return self.gain >= LEAST_GAIN and bool(self.fallen or 2 * self.unsound > len(self.outcomes))


def standings(study: Study, folder: Path) -> list[Standing]:
    """The base and every entrant of which a run is measured."""
    base = read_results(folder / BASE)
    metrics = [of for of in base.metrics() if not of.part]
    kinds = {of.name: base.kind(of.name) for of in base.metrics()}
    rows = [Standing(BASE, "base", {of.name: found for of in metrics if (found := base.estimate(base.reference, of.name))}, kinds=kinds)]
    for entrant in study.entrants:
        outcomes = tuple(found for job in study.jobs if job.entrant is entrant and (found := _outcome(folder / job.name, job.seed)))
        for each in outcomes:
            _check_alike(base, each, folder / f"{entrant.name}-{each.seed}")
        if outcomes:
            metrics = [of for of in outcomes[0].results.metrics() if not of.part]
            values = {of.name: _value(of, outcomes) for of in metrics if outcomes[0].results.estimate("trained", of.name)}
            changes = {of.name: found for of in metrics if (found := _change(of, outcomes))}
            kinds = {of.name: outcomes[0].results.kind(of.name) for of in outcomes[0].results.metrics()}
            rows.append(Standing(entrant.name, entrant.label, values, changes, outcomes, entrant, kinds))
    return rows


def meaning(rows: Sequence[Standing], name: str) -> Metric:
    """What a name means in these rows."""
    return metric(name, next((row.kinds[name] for row in rows if name in row.kinds), ""))


def _check_alike(base: Results, outcome: Outcome, folder: Path) -> None:
    """UserError for a run that was measured by another protocol than the base, or against other weights: an older version of this package may have done so."""
    weights = [results.run.get("models", {}).get(model, {}).get("sha256") for results, model in ((base, base.reference), (outcome.results, BASE))]
    if different := unlike(base.protocol, outcome.results.protocol) or ("the weights of the base are others" if weights[0] != weights[1] else ""):
        raise UserError(
            f"{folder} was not measured as {folder.parent / BASE}, and numbers of different protocols share no table: {different}; "
            "delete the results.json that is out of date and give the same command again"
        )


def pictures(outcomes: Sequence[Outcome], name: str, model: str = "trained") -> NDArray[np.float64]:
    """What the pictures scored, `(S, P, K)`, of the prompts that were measured in every run; (S, 0, 0) for what is no measure of a picture."""
    tables = [dict(zip(*each.scores.get(model, Scores()).table(name), strict=True)) for each in outcomes]
    shared = [prompt for prompt in tables[0] if all(prompt in table for table in tables)]
    if not shared:
        return np.empty((len(outcomes), 0, 0))
    samples = min(len(table[shared[0]]) for table in tables)
    return np.array([[table[prompt][:samples] for prompt in shared] for table in tables])


def _outcome(folder: Path, seed: int) -> Outcome | None:
    if not (folder / "results.json").is_file():
        return None
    results, log = read_results(folder), folder / METRICS
    records = tuple(read_jsonl(log)) if log.is_file() else ()
    return Outcome(seed, results, read_scores(folder / "scores.jsonl", several=len(results.tasks) > 1), records)


def is_mean(results: Results, of: Metric) -> bool:
    """Whether a model's number is the mean of what its pictures scored: not that of a set (FID), a sum, a maximum, or a mean of tasks."""
    return results.kind(of.name) not in ("frechet", "count", "geneval") and of.family not in ("expected_maximum", "detections")


def _value(of: Metric, outcomes: Sequence[Outcome]) -> Estimate:
    seeds = [each.results.estimate("trained", of.name) or _NOTHING for each in outcomes]
    values = pictures(outcomes, of.name)
    if is_mean(outcomes[0].results, of) and values.size:
        rates = of.share and bool(np.isin(values[~np.isnan(values)], (0.0, 1.0)).all())
        within = clustered_rate(_beside(values)) if rates else mean_over_prompts(_beside(values), seed=0)
    else:
        within = _typical(seeds)
    found = over_repeats(seeds, within)
    if of.share:
        return replace(found, low=float(np.clip(found.low, 0, 1)), high=float(np.clip(found.high, 0, 1)))
    return replace(found, low=float(np.maximum(found.low, 0))) if of.family in DISTANCES else found


def _change(of: Metric, outcomes: Sequence[Outcome]) -> Estimate | None:
    """Paired, picture by picture, over prompts and seeds."""
    seeds = [found for each in outcomes if (found := each.results.change(of.name))]
    if len(seeds) < len(outcomes):
        return None
    if not is_mean(outcomes[0].results, of):
        return over_repeats(seeds, _typical(seeds))
    after, before = (pictures(outcomes, of.name, model) for model in ("trained", "base"))
    if after.shape != before.shape or not after.size:
        return None
    return over_repeats(seeds, paired_change(_beside(before), _beside(after), seed=0))


def _typical(seeds: Sequence[Estimate]) -> Estimate:
    """What the evaluations of the seeds say of themselves on average: as wide as one of them, though all together know more."""
    return Estimate(*(float(np.mean([getattr(each, name) for each in seeds])) for name in ("value", "low", "high")), n=sum(each.n for each in seeds))


def _beside(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """`(S, P, K)` as `(P, S K)`: the pictures of all runs of a prompt together."""
    return values.transpose(1, 0, 2).reshape(values.shape[1], -1)
