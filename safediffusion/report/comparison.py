"""Measurements beside each other. Numbers of different protocols never share a table: the protocol decides the number."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safediffusion.evaluate.statistics import Estimate
from safediffusion.report.metric import AGAINST_BASE, Metric, split
from safediffusion.report.results import Results, read_results, with_pairs
from safediffusion.report.run import Run
from safediffusion.report.tables import Cell

# What a protocol tells a reader and decides no number.
TOLD = ("title", "licence", "citation", "known")
_NAMED = 3  # so many differences are said


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
            if deciding(group[0].results.protocol) == deciding(run.results.protocol):
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
    first, *others = (comparison.runs[0].results.protocol for comparison in comparisons)
    different = list(dict.fromkeys(key for other in others for key, _, _ in differences(first, other)))
    return f"These runs were not measured alike ({', '.join(different)} differ), so they stand in separate tables."


def beside(paths: Sequence[Path]) -> Results:
    """The models of several measurements, each a folder or its `results.json`, as one: what `safediffusion compare` shows.

    Changes are counted from the first model, and paired where the scores of its pictures and of the other's are there. A model that is
    in two of them, the same numbers of the same weights, is shown once. ValueError names what differs where two were not measured alike.
    """
    names = _names(paths)
    everything = {name: read_results(path, paired=False) for name, path in zip(names, paths, strict=True)}
    first, *others = everything
    for name in others:
        if found := unlike(everything[first].protocol, everything[name].protocol):
            raise ValueError(f"{name} was not measured as {first}, and numbers of different protocols share no table: {found}; evaluate both alike")
    models: dict[str, dict[str, Estimate]] = {}
    scores, called, seen = {}, {}, []
    for (name, results), path in zip(everything.items(), paths, strict=True):
        for model in results.columns:
            if not any(_same(results, model, *each) for each in seen):
                own = _own_name(name, results, model, models, alone=len(paths) == 1)
                models[own], called[own], scores[own] = results.models[model], model, _folder(path) / "scores.jsonl"
                seen.append((results, model))
    if len(models) < 2:
        raise ValueError("a comparison takes two models: name another folder, or evaluate one against the other")
    if any(not _same(everything[first], everything[first].reference, each, each.reference) for each in everything.values()):
        # These are distances from a model of each measurement's own.
        models = {model: {key: each for key, each in found.items() if split(key)[1] not in AGAINST_BASE} for model, found in models.items()}
    warnings = tuple(f"{name}: {warning}" if others else warning for name, results in everything.items() for warning in results.warnings)
    return with_pairs(Results(everything[first].protocol, models, {}, {}, warnings), scores, called)


def deciding(protocol: dict[str, Any]) -> dict[str, Any]:
    """A protocol without what it only tells."""
    tasks = protocol.get("tasks")
    if not isinstance(tasks, dict):
        return protocol
    return protocol | {"tasks": {name: {key: value for key, value in each.items() if key not in TOLD} for name, each in tasks.items()}}


def unlike(one: dict[str, Any], other: dict[str, Any]) -> str:
    """What differs between two protocols, in words such as `samples was 4 and is 1`; empty when nothing does."""
    found = differences(deciding(one), deciding(other))
    if tasks := [(was, now) for key, was, now in found if key == "id"]:
        return f"the tasks were {tasks[0][0]} and are {tasks[0][1]}"
    said = [f"{key} was {_shown(was)} and is {_shown(now)}" for key, was, now in found[:_NAMED]]
    return ", ".join(said) + (f", and {len(found) - _NAMED} more" if len(found) > _NAMED else "")


def differences(one: Any, other: Any, path: tuple[str, ...] = ()) -> list[tuple[str, Any, Any]]:
    """(key, value, value) of all places in which two trees of JSON differ, the key as short as it can be said."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = dict.fromkeys([*one, *other])
        return [each for key in keys for each in differences(one.get(key), other.get(key), (*path, key))]
    short = ".".join(path[2:] if path[:1] == ("tasks",) and len(path) > 2 else path).removeprefix("painting/")
    return [] if one == other else [(short, one, other)]


def _comparison(runs: Sequence[Run]) -> Comparison:
    results = [run.results for run in runs]
    names = dict.fromkeys(name for each in results for name in each.models[each.subject])
    metrics = tuple(of for of in results[0].metrics(names) if not of.part)
    rows = tuple(tuple(Cell(of, each.estimate(each.subject, of.name), each.change(of.name)) for of in metrics) for each in results)
    return Comparison(results[0].protocol_id, tuple(runs), metrics, rows)


def _folder(path: Path) -> Path:
    return path.parent if path.suffix == ".json" and not path.is_dir() else path


def _names(paths: Sequence[Path]) -> list[str]:
    """The folders' names; those of the same name are told apart by their paths."""
    folders = [_folder(path) for path in paths]
    short = [folder.resolve().name for folder in folders]
    names = [name if short.count(name) == 1 else str(folder) for name, folder in zip(short, folders, strict=True)]
    if len(set(names)) < len(names):
        raise ValueError("the same measurement is named twice; name each once")
    return names


def _own_name(name: str, results: Results, model: str, taken: Container[str], alone: bool) -> str:
    """The measurement's name for its subject, the model's own for the others."""
    if not alone and model == results.subject and name not in taken:
        return name
    return model if model not in taken else f"{name}/{model}"


def _same(results: Results, model: str, other: Results, theirs: str) -> bool:
    """Whether two models are one: the same weights under the same guide with the same numbers, or the same numbers where none were recorded."""
    told = [each.run.get("models", {}).get(name, {}) for each, name in ((results, model), (other, theirs))]
    return all(told[0].get(key) == told[1].get(key) for key in ("sha256", "guide")) and results.models[model] == other.models[theirs]


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
