"""`results.json`: what an evaluation found, read back. The one file that a report cannot do without."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safediffusion.evaluate.statistics import Estimate
from safediffusion.report.metric import Metric, in_order, metric, split
from safediffusion.report.pairs import Paired, changes_of, read_scores

SCHEMA = 1


@dataclass(frozen=True)
class Results:
    """Estimates by model and metric, paired changes of the subject by metric, and what they were measured with.

    `paired` has the changes of every other model, and the p-values of parts, where the scores of the pictures were read.
    """

    protocol: dict[str, Any]
    models: dict[str, dict[str, Estimate]]
    changes: dict[str, Estimate]
    run: dict[str, Any]
    warnings: tuple[str, ...] = ()
    paired: dict[str, Paired] = field(default_factory=dict)

    @property
    def protocol_id(self) -> str:
        return str(self.protocol.get("id", "unnamed protocol"))

    @property
    def tasks(self) -> dict[str, dict[str, Any]]:
        """The protocol of each task."""
        found = self.protocol.get("tasks")
        return {name: each for name, each in found.items() if isinstance(each, dict)} if isinstance(found, dict) else {}

    @property
    def guides(self) -> dict[str, dict[str, Any]]:
        """The settings of the guide under which a model painted, by model; those without one are left out."""
        models = self.run.get("models")
        told = models.items() if isinstance(models, dict) else ()
        return {name: each["guide"] for name, each in told if isinstance(each, dict) and isinstance(each.get("guide"), dict)}

    @property
    def given(self) -> list[str]:
        """What stands under a model's name and is a folder of pictures that were made elsewhere."""
        models = self.run.get("models")
        told = models.items() if isinstance(models, dict) else ()
        return [name for name, each in told if isinstance(each, dict) and each.get("pipeline") == "pictures"]

    @property
    def reference(self) -> str:
        """The model that changes are measured against."""
        return "base" if "base" in self.models else next(iter(self.models))

    @property
    def subject(self) -> str:
        """The model under test; the reference itself when it was evaluated alone."""
        if "trained" in self.models:
            return "trained"
        return next((name for name in self.models if name != self.reference), self.reference)

    @property
    def columns(self) -> list[str]:
        """Model names in the order of a table: the reference first, then the subject."""
        return list(dict.fromkeys((self.reference, self.subject, *self.models)))

    @property
    def alone(self) -> bool:
        return self.subject == self.reference

    def estimate(self, model: str, metric: str) -> Estimate | None:
        """An estimate, or None when the metric was not measured for this model."""
        return _there(self.models[model].get(metric))

    def change(self, metric: str, model: str = "") -> Estimate | None:
        """A paired change of a model, the subject where none is named, or None when there is none."""
        model = model or self.subject
        recorded = self.changes.get(metric) if model == self.subject else None
        return _there(recorded or (self.paired[model].changes.get(metric) if model in self.paired else None))

    def p_value(self, metric: str, model: str = "") -> float:
        """That a part of a total did not change, adjusted for all that were compared (Holm); NaN when it is not known."""
        model = model or self.subject
        return self.paired[model].p_values.get(metric, math.nan) if model in self.paired else math.nan

    def metric(self, name: str) -> Metric:
        """What a name means in these results."""
        return metric(name, self.kind(name))

    def metrics(self, names: Iterable[str] = ()) -> list[Metric]:
        """The metrics of these names in the order of a table; of all that were measured where none are given."""
        names = list(names) or [name for model in self.models.values() for name, each in model.items() if _there(each)]
        return in_order(names, {name: self.kind(name) for name in names})

    def kind(self, name: str) -> str:
        """Of which kind the measure behind a metric is; empty where the protocol does not say."""
        task, family, _ = split(name)
        told = self.tasks.get(task) or (next(iter(self.tasks.values())) if len(self.tasks) == 1 else {})
        measure = (told.get("measures") or {}).get(family)
        return str(measure.get("kind", "")) if isinstance(measure, dict) else ""


def read_results(path: Path, paired: bool = True) -> Results:
    """Read `results.json`, a file or that of a folder, and unless `paired` is off the scores of single pictures where they lie beside it."""
    path = path if path.suffix == ".json" and not path.is_dir() else path / "results.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: a report needs the results of `safediffusion evaluate`")
    results = parse_results(read_document(path), str(path))
    return with_pairs(results, {name: path.with_name("scores.jsonl") for name in results.models}) if paired else results


def with_pairs(results: Results, scores: Mapping[str, Path], called: Mapping[str, str] | None = None) -> Results:
    """Results with the paired changes from the reference of every model whose scores, and the reference's, are there.

    `scores` are files of JSON lines by model; `called` is what a model is called in its file, where that is another name.
    """
    if results.alone:
        return results
    read = {path: read_scores(path, several=len(results.tasks) > 1) for path in dict.fromkeys(scores.values()) if path.is_file()}
    found = {name: read[path].get((called or {}).get(name, name)) for name, path in scores.items() if path in read}
    return replace(results, paired=changes_of(results, {name: each for name, each in found.items() if each}))


def read_document(path: Path) -> dict[str, Any]:
    """One JSON object of a run folder."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable JSON ({error}): delete it or write it again") from error
    if not isinstance(document, dict):
        raise ValueError(f"{path} should hold one JSON object: delete it or write it again")
    return document


def parse_results(document: Mapping[str, Any], origin: str = "results") -> Results:
    """Results from the document that `evaluate` writes; `origin` is what error messages call it."""
    if document.get("schema") != SCHEMA:
        raise ValueError(f"{origin} has schema {document.get('schema')!r}, this version reads {SCHEMA}: evaluate again")
    models = {name: _estimates(metrics) for name, metrics in document.get("models", {}).items()}
    if not models:
        raise ValueError(f"{origin} holds no model: evaluate again")
    return Results(
        protocol=dict(document.get("protocol") or {}),
        models=models,
        changes=_estimates(document.get("changes") or {}),
        run=dict(document.get("run") or {}),
        warnings=tuple(str(each) for each in document.get("warnings") or ()),
    )


def _there(found: Estimate | None) -> Estimate | None:
    return None if found is None or math.isnan(found.value) else found


def _estimates(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, Estimate]:
    return {name: Estimate(*(as_number(fields.get(key)) for key in ("value", "low", "high")), n=int(fields.get("n") or 0)) for name, fields in metrics.items()}


def as_number(value: Any) -> float:
    """A float; NaN for null, a missing key, or anything that is no number."""
    return float(value) if isinstance(value, int | float) else math.nan
