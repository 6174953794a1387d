"""A study from its file to its table and figure, for the command and for Python alike."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safediffusion.config import dump
from safediffusion.errors import UserError
from safediffusion.files import check_writable, write_bytes, write_json, write_text
from safediffusion.provenance import commit, versions
from safediffusion.study import budgets, front
from safediffusion.study.beforehand import check
from safediffusion.study.outcome import Standing, standings
from safediffusion.study.picture import curves
from safediffusion.study.plan import Study
from safediffusion.study.run import cards, carry_out
from safediffusion.study.table import document, markdown
from safediffusion.train.run_folder import locked

SCHEMA = 1


def perform(
    study: Study,
    out: Path,
    *,
    jobs: int | None = None,
    command: Sequence[str] = (),
    moved: Callable[[float, str], None] = lambda done, note: None,
    drawn: Sequence[str] = (),
) -> tuple[list[Standing], dict[str, str]]:
    """Run what is missing, `jobs` runs at once (one on each GPU, without any one on each core), then write study.json, study.md and, where runs were probed, study.png.

    `drawn` names metrics that must be among what is measured. Returns the rows, and the runs that failed with a sentence for each.
    UserError when no run was measured, and while another process works in `out`.
    """
    check(study, out)
    check_writable(out)
    with locked(out):
        failures = carry_out(study, out, jobs or len(cards()) or os.cpu_count() or 1, moved, drawn)
        rows = standings(study, out)
        if len(rows) < 2:
            raise UserError(f"all {len(study.jobs)} runs failed; the first: {told(failures)[0]}")
        facts = facts_of(study, rows, command, failures)
        write_json(out / "study.json", facts | {"rows": document(rows)})
        write_text(out / "study.md", markdown(study, rows, shlex.join(command), failures))
        if any(each.probes for row in rows for each in row.outcomes):
            write_bytes(out / "study.png", curves(rows, study.settings.title, study.clock))
    return rows, failures


def facts_of(study: Study, rows: Sequence[Standing], command: Sequence[str], failures: dict[str, str]) -> dict[str, Any]:
    """What stands before the numbers in study.json and pareto.json."""
    protocol = rows[1].outcomes[0].results.protocol
    told = {"schema": SCHEMA, "command": shlex.join(command), "study": dump(study.settings), "protocol": protocol}
    return told | {"failures": failures, "git": commit(), "versions": versions()}


def told(failures: dict[str, str]) -> list[str]:
    """A sentence for each run that failed."""
    return [f"{name}: {why}" for name, why in failures.items()]


def sweep_written(study: Study, rows: Sequence[Standing], out: Path, command: Sequence[str], failures: dict[str, str]) -> str:
    """Write pareto.json, pareto.md and pareto.png; returns what there is to say of the fronts. UserError where no row has both axes."""
    axes, title = study.settings.pareto, study.settings.title
    series = front.fronts(study, rows)
    if not series:
        raise UserError(f"no run measured both pareto.unsafe = {axes.unsafe!r} and pareto.quality = {axes.quality!r}; there are {', '.join(rows[-1].values)}")
    said, kept = front.markdown(series, axes), budgets.budgets(study, series)
    numbers = front.document(series, axes) | {"budgets": budgets.document(kept), "rows": document(rows)}
    write_json(out / "pareto.json", facts_of(study, rows, command, failures) | numbers)
    parts = [f"# {title or 'Sweep'}", f"    {shlex.join(command)}", said, budgets.markdown(kept, axes)]
    write_text(out / "pareto.md", "\n\n".join(part for part in parts if part) + "\n")
    write_bytes(out / "pareto.png", front.picture(series, rows, axes, title))
    return said
