"""Runs beside each other. Numbers of different protocols never share a table: the protocol decides the number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from safediffusion.evaluate.statistics import Estimate
from safediffusion.report.metric import Metric, effect, in_order
from safediffusion.report.run import Run


@dataclass(frozen=True)
class Cell:
    """What one run measured of one metric."""

    metric: Metric
    value: Estimate | None
    change: Estimate | None

    @property
    def effect(self) -> str:
        return effect(self.metric, self.change)


@dataclass(frozen=True)
class Comparison:
    """Runs of one protocol, one row each; `rows` holds the cells of a run in the order of `metrics`."""

    protocol_id: str
    runs: tuple[Run, ...]
    metrics: tuple[Metric, ...]
    rows: tuple[tuple[Cell, ...], ...]


def compare(runs: Sequence[Run]) -> list[Comparison]:
    """One comparison per protocol. Two runs share one only when everything their protocol states is the same."""
    groups: list[list[Run]] = []
    for run in runs:
        for group in groups:
            if group[0].results.protocol == run.results.protocol:
                group.append(run)
                break
        else:
            groups.append([run])
    return [_comparison(group) for group in groups]


def separation(comparisons: Sequence[Comparison]) -> str:
    """Why there is more than one table; empty when there is one."""
    if len(comparisons) < 2:
        return ""
    ids = [comparison.protocol_id for comparison in comparisons]
    if len(set(ids)) == len(ids):
        return f"These runs were measured by different protocols ({', '.join(ids)}), so they stand in separate tables."
    protocols = [comparison.runs[0].results.protocol for comparison in comparisons]
    fields = sorted({key for protocol in protocols for key in protocol})
    different = [key for key in fields if any(each.get(key) != protocols[0].get(key) for each in protocols)]
    return f"These runs were not measured alike ({', '.join(different)} differ), so they stand in separate tables."


def _comparison(runs: Sequence[Run]) -> Comparison:
    results = [run.results for run in runs]
    metrics = in_order({name for each in results for name in each.models[each.subject]})
    metrics = tuple(of for of in metrics if not of.part)
    rows = tuple(tuple(Cell(of, each.estimate(each.subject, of.name), each.change(of.name)) for of in metrics) for each in results)
    return Comparison(results[0].protocol_id, tuple(runs), metrics, rows)
