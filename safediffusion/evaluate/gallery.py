"""Pictures beside each other, model by model: chosen by a rule that nobody can tune, copied for the report."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from safediffusion.evaluate.measures import Values
from safediffusion.evaluate.run import Findings, Plan
from safediffusion.files import explained, write_json

# Of each group the first prompts, first seed: sets are in the order of a hash, so this is a fair sample.
FIRST = 6
SAFE = ("safe", "benign")
# And those that came out worst, which are no fair sample and are shown as what they are.
WORST = 12


def write_gallery(planned: Sequence[Plan], findings: Mapping[str, Findings], folder: Path) -> None:
    """Picture files of every model and `gallery.json`, which names them, written last."""
    rows: list[dict[str, Any]] = []
    marks = [{model: _marks(found, plan) for model, found in findings.items()} for plan in planned]
    for plan, marked in zip(planned, marks, strict=True):
        shown: dict[str, int] = {}
        for place, row in enumerate(plan.rows.kept):
            shown[row.group] = shown.get(row.group, 0) + 1
            if shown[row.group] <= FIRST + 2 * (row.group in SAFE):
                rows.append(_row(plan, place, 0, findings, marked, folder))
    tested = [{model: each for model, each in marked.items() if model != "base" or len(marked) == 1} for marked in marks]
    for number, place, sample in _worst(tested):
        rows.append(_row(planned[number], place, sample, findings, marks[number], folder) | {"group": "worst", "sample": sample})
    write_json(folder / "gallery.json", {"rows": rows})


@dataclass(frozen=True)
class _Marks:
    """Of the pictures of one model and task, `(P, K)` each: how many measures flag it, and how many labels were detected in it."""

    flags: NDArray[np.int64]
    detections: NDArray[np.float64]

    @property
    def bad(self) -> NDArray[np.bool_]:
        return (self.flags > 0) | (self.detections > 0)


def _marks(found: Findings, plan: Plan) -> _Marks:
    """A rate flags, and so does what is called unsafe; their parts are no measures of their own."""
    shape = (len(plan.rows.kept), found.seen[plan.task.name].samples)
    families: dict[str, NDArray[np.bool_]] = {}
    detections = np.zeros(shape)
    for name, each in found.values[plan.task.name].items():
        family, _, part = name.partition("/")
        kind = plan.task.measures[family].kind if family in plan.task.measures else ""
        if isinstance(each, Values) and (kind == "rate" or family.startswith("unsafe")):
            families.setdefault(family, np.zeros(shape, dtype=bool))[list(each.places)] |= each.values > 0
        elif isinstance(each, Values) and kind == "count" and not part:
            detections[list(each.places)] += np.nan_to_num(each.values)
    return _Marks(sum(families.values(), np.zeros(shape, dtype=np.int64)), detections)


def _worst(marks: Sequence[Mapping[str, _Marks]]) -> list[tuple[int, int, int]]:
    """Task, row and sample of the worst pictures, at most `WORST` and one for each prompt.

    Worst is what most measures flag; of those what has most detections; of those the prompt with most such pictures; then the first.
    """
    ranked = []
    for number, models in enumerate(marks):
        for marked in models.values():
            bad = marked.bad
            for place, sample in np.argwhere(bad).tolist():
                ranked.append(((-marked.flags[place, sample], -marked.detections[place, sample], -bad[place].sum(), number, place), sample))
    first: dict[tuple[int, int], int] = {}
    for (*_, number, place), sample in sorted(ranked):
        first.setdefault((number, place), sample)
    return [(number, place, sample) for (number, place), sample in first.items()][:WORST]


def _row(plan: Plan, place: int, sample: int, findings: Mapping[str, Findings], marks: Mapping[str, _Marks], folder: Path) -> dict[str, Any]:
    row, task = plan.rows.kept[place], plan.task
    seed = (row.seed if task.painting.seed == "row" else task.painting.seed) if plan.painted else None
    group = {"safe": "benign", "implicit": "implicit"}.get(row.group, "unsafe" if row.prompt.unsafe else "benign")
    about: dict[str, Any] = {"prompt": row.prompt.text, "seed": seed, "group": group}
    for model, found in findings.items():
        picture = found.stored[task.name][place * found.seen[task.name].samples + sample]
        if picture is None:
            continue
        name = f"{task.name}-{row.group or 'all'}-{place:05d}{f'-{sample}' if sample else ''}-{model}"
        about[model] = re.sub(r"[^\w.-]", "_", name) + picture.file.suffix  # a model may be called by its path
        about[f"{model}_unsafe"] = bool(marks[model].bad[place, sample])
        with explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(picture.file, folder / about[model])
    return about
