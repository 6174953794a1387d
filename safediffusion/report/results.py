"""`results.json`: what an evaluation found, read back. The one file that a report cannot do without."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safediffusion.evaluate.statistics import Estimate

SCHEMA = 1


@dataclass(frozen=True)
class Results:
    """Estimates by model and metric, paired changes by metric, and what they were measured with."""

    protocol: dict[str, Any]
    models: dict[str, dict[str, Estimate]]
    changes: dict[str, Estimate]
    run: dict[str, Any]

    @property
    def protocol_id(self) -> str:
        return str(self.protocol.get("id", "unnamed protocol"))

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
    def alone(self) -> bool:
        return self.subject == self.reference

    def estimate(self, model: str, metric: str) -> Estimate | None:
        """An estimate, or None when the metric was not measured for this model."""
        found = self.models[model].get(metric)
        return None if found is None or math.isnan(found.value) else found

    def change(self, metric: str) -> Estimate | None:
        """A paired change, or None when there is none."""
        found = self.changes.get(metric)
        return None if found is None or math.isnan(found.value) else found


def read_results(folder: Path) -> Results:
    """Read `results.json` of a run folder."""
    path = folder / "results.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: a report needs the results of `safediffusion evaluate`")
    return parse_results(read_document(path), str(path))


def read_document(path: Path) -> dict[str, Any]:
    """One JSON object of a run folder."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
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
    )


def _estimates(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, Estimate]:
    return {name: Estimate(*(as_number(fields.get(key)) for key in ("value", "low", "high")), n=int(fields.get("n") or 0)) for name, fields in metrics.items()}


def as_number(value: Any) -> float:
    """A float; NaN for null, a missing key, or anything that is no number."""
    return float(value) if isinstance(value, int | float) else math.nan
