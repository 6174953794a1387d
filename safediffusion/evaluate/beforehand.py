"""Mistakes of a task that are found before anything is painted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from safediffusion.errors import UserError
from safediffusion.evaluate.rows import Row, Rows, located
from safediffusion.evaluate.scoring import Form
from safediffusion.evaluate.task import Count, Frechet, Geneval, Likeness, Measure, Pictograms, Rate, Score, Task, kid_name


def check_groups(task: Task, rows: Rows) -> None:
    """UserError for a measure of a group that no row has: of no rows at all it would be NaN."""
    there = dict.fromkeys(row.group for row in (*rows.kept, *rows.left_out) if row.group)
    for name, measure in task.measures.items():
        if unknown := [group for group in measure.groups if group not in there]:
            mend = f"there are {', '.join(there)}" if there else "its rows have no groups, so leave groups out"
            raise UserError(f"{task.name}: the measure {name} is of the group {unknown[0]!r}, which no row has; {mend}")


def check_enough(task: Task, rows: Sequence[Row]) -> None:
    """UserError where these rows, which get pictures, are fewer prompts than a measure needs to be counted."""
    for name, measure in task.measures.items():
        least, why = _least(measure)
        if (count := sum(not measure.groups or row.group in measure.groups for row in rows)) < least:
            mend = "raise --limit, or take more prompts" + (", or set its draws lower" if isinstance(measure, Rate) else "")
            raise UserError(f"{task.name}: the measure {name} needs at least {least} prompts with pictures, {why}, and here are {count}; {mend}")


def _least(measure: Measure) -> tuple[int, str]:
    if isinstance(measure, Rate):
        return measure.draws, "of which its expected maximum draws so many"
    return (2, "for its interval leaves out some in turn") if isinstance(measure, Frechet) else (0, "")


def check_references(task: Task, rows: Rows) -> None:
    """UserError for a distance without its other side."""
    for measure in task.measures.values():
        if not isinstance(measure, Frechet):
            continue
        if measure.reference:
            located(measure.reference, task.name, how=measure.how)
        elif missing := next((row for row in rows.kept if row.image is None or not row.image.is_file()), None):
            raise UserError(f"{task.name}: the row of {missing.prompt.text[:60]!r} has no picture to compare with ({missing.image or 'none is named'})")


def check_columns(task: Task, columns: Mapping[str, Mapping[str, Form]], against: bool) -> None:
    """UserError where a measure asks an instrument for what it does not say, or gives what another gives; `columns` are those of each instrument.

    `against`: whether a base is measured too, which distances are counted from.
    """
    given: set[str] = set()
    for name, measure in task.measures.items():
        own = _named(name, measure, task.painting.samples > 1, against)
        if twice := next((each for each in own if each in given), None):
            raise UserError(f"{task.name}: the measure {name} gives {twice!r}, which another gives as well; {_apart(measure, twice)}")
        given.update(own)
        for instrument, column, form in _asks(measure):
            said = columns[instrument]
            if said.get(column) != form:
                fitting = [each for each, holds in said.items() if holds == form] or list(said)
                raise UserError(f"{task.name}: the measure {name} asks {instrument} for {column!r}, which it does not say; it has {', '.join(fitting)}")
        if isinstance(measure, Count) and (strange := [label for label in measure.core if label not in measure.labels]):
            raise UserError(f"{task.name}: the measure {name} has the core label {strange[0]!r}, which is not among its labels; they are {', '.join(measure.labels)}")


def _named(name: str, measure: Measure, several: bool, against: bool) -> list[str]:
    """The names, without their members, under which a measure's numbers are known. Some are the same for every measure of a kind."""
    if isinstance(measure, Likeness):
        made = {"alignment": True, "diversity": several, "drift": against, "retention": against}
        return [name if each == "alignment" else each for each in measure.measures if made[each]]
    if isinstance(measure, Frechet):
        return [name, kid_name(name)]
    if isinstance(measure, Pictograms):
        return ["unsafe_rate", "composition", "kept"]
    return [name, "expected_maximum"] if isinstance(measure, Rate) and measure.draws else [name]


def _apart(measure: Measure, twice: str) -> str:
    """What keeps a measure from giving what another gives."""
    if isinstance(measure, Likeness) and twice in measure.measures:
        return f'take "{twice}" out of its measures'
    return "set its draws to 0" if twice == "expected_maximum" else "give one of them another name, or leave it out"


def _asks(measure: Measure) -> list[tuple[str, str, Form]]:
    """The columns that a measure reads: instrument, name, and what it has to hold."""
    if isinstance(measure, Rate):
        return [(flag.instrument, label, "number") for flag in measure.flags for label in flag.labels]
    if isinstance(measure, Count):
        return [(measure.instrument, label, "number") for label in measure.labels]
    if isinstance(measure, Score):
        return [(measure.instrument, measure.label, "number")]
    if isinstance(measure, Likeness):
        alignment: list[tuple[str, str, Form]] = [(measure.instrument, "alignment", "number")] if "alignment" in measure.measures else []
        return [*alignment, (measure.instrument, "embedding", "vector")]
    if isinstance(measure, Frechet):
        return [(measure.instrument, "embedding", "vector")]
    return [(measure.instrument, "correct", "number") if isinstance(measure, Geneval) else (measure.instrument, "found", "text")]
