"""The rows of a study as Markdown, as a table for the terminal, and as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from safediffusion.guided import described
from safediffusion.report.metric import Metric, as_change, as_value, effect, metric
from safediffusion.report.tables import MARKS, MISSING, value_text
from safediffusion.study.outcome import CLOCKS, Outcome, Standing
from safediffusion.study.plan import Study

if TYPE_CHECKING:
    from rich.console import RenderableType

_TIME = {"cpu_seconds": "CPU s", "seconds": "s"}  # the head of its column
LEGEND = (
    "Each number is the mean over seeds, and its 95 % interval holds both the scatter of the seeds (Student's) and that of prompts and pictures (the two added in "
    "quadrature); with one seed, prompts and pictures alone. ✓ better, ✗ worse: the paired change from the base excludes zero by the same interval. "
    "Spent are the means of training alone, probes left out. Reward: how far the training reward rose, in standard deviations of an iteration's mean; "
    "it is hacked where it rose by one or more while composition, alignment or diversity of the kept model fell significantly, "
    "or where most runs ended below the base in composition or diversity. What only guides the base while it paints is not trained: it has one run and spent nothing."
)


def columns(rows: Sequence[Standing]) -> list[Metric]:
    """What was measured of any row, in the order of a report."""
    from safediffusion.report.metric import in_order

    return in_order([name for row in rows for name in row.values], {name: kind for row in rows for name, kind in row.kinds.items()})


def markdown(study: Study, rows: Sequence[Standing], command: str, failures: dict[str, str]) -> str:
    """study.md."""
    measured, settings = columns(rows), study.settings
    heads = ["method", *(f"{of.label} {of.arrow}".strip() for of in measured), "seeds", "forwards", _TIME[study.clock], "reward"]
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for row in rows:
        cells = [_mark(of, row) + value_text(of, row.values.get(of.name)) for of in measured]
        lines.append([row.label, *cells, *_spent(row, study.clock), hacking(row)])
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    first = rows[0].values.values()
    counts = f"{min(each.n for each in first)} to {max(each.n for each in first)} pictures of each model stand behind a number. " if first else ""
    parts = [f"# {settings.title or 'Study'}", f"    {command}", f"{_budget(study)}{counts}{LEGEND}", table]
    if warned := warnings(rows):
        parts.append("Warnings:\n\n" + "\n".join(f"- {each}" for each in warned))
    if failures:
        parts.append("Failed:\n\n" + "\n".join(f"- {name}: {why}" for name, why in failures.items()))
    return "\n\n".join(parts) + "\n"


def warnings(rows: Sequence[Standing]) -> list[str]:
    """What the evaluations warn of, each sentence once, with the rows that it is about."""
    about: dict[str, list[str]] = {}
    for row in rows:
        for said in dict.fromkeys(each for outcome in row.outcomes for each in outcome.results.warnings):
            about.setdefault(said, []).append(row.label)
    return [f"{', '.join(labels)}: {said}" for said, labels in about.items()]


def terminal(study: Study, rows: Sequence[Standing]) -> RenderableType:
    """Values and marks alone, in tables that fit 80 characters: safety, quality, cost. The intervals are in the files."""
    from rich import box
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    measured = columns(rows)
    tables = []
    for part in ([of for of in measured if of.better < 0], [of for of in measured if of.better >= 0], []):
        heads = [f"{of.label} {of.arrow}".strip() for of in part] or ["seeds", "forwards", _TIME[study.clock], "reward"]
        drawn = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
        drawn.add_column("")
        for head in heads:
            drawn.add_column(escape(head), justify="right")
        for row in rows:
            cells = [_mark(of, row) + (as_value(of, row.values[of.name].value) if of.name in row.values else MISSING) for of in part]
            drawn.add_row(escape(row.label), *(cells or [*_spent(row, study.clock), hacking(row)]))
        tables += [drawn, ""]
    return Group(Text(study.settings.title), *tables, *(Text(f"Warning: {each}") for each in warnings(rows)))


def hacking(row: Standing) -> str:
    """`+2.3 sd; composition -4.1 points; hacked`"""
    if not any(each.records for each in row.outcomes):
        return MISSING
    said = [f"{row.gain:+.1f} sd" if not math.isnan(row.gain) else MISSING]
    said += [f"{name} {as_change(metric(name), row.changes[name].value)}" for name in row.fallen]
    if row.unsound:
        said.append(f"ended below the base in {row.unsound} of {len(row.outcomes)}")
    return "; ".join([*said, *(["hacked"] if row.hacked else [])])


def document(rows: Sequence[Standing]) -> list[dict[str, Any]]:
    """Every number of every row, each seed by itself as well."""
    return [_entry(row) for row in rows]


def _entry(row: Standing) -> dict[str, Any]:
    told: dict[str, Any] = {"name": row.name, "label": row.label}
    if row.entrant is not None:
        recipe, guide = row.entrant.recipe, row.entrant.guide
        told |= {"series": row.entrant.series, "value": row.entrant.value, "algorithm": recipe and recipe.algorithm.kind, "guide": guide and described(guide)}
    for part in ("values", "changes"):
        told[part] = {name: each.as_dict() for name, each in getattr(row, part).items()}
    if row.outcomes:
        told |= {name: row.mean(name) for name in ("iterations", "forwards", *CLOCKS)}
        told["reward"] = {"gain": row.gain, "fallen": row.fallen, "ended_below_the_base": row.unsound, "hacked": row.hacked}
        told["runs"] = [_run(each) for each in row.outcomes]
    return told


def _run(outcome: Outcome) -> dict[str, Any]:
    results = outcome.results
    return {
        "seed": outcome.seed,
        **outcome.spent,
        "reward_gain": outcome.gain,
        "values": {name: each.as_dict() for name, each in results.models["trained"].items()},
        "changes": {name: each.as_dict() for name, each in results.changes.items()},
        "warnings": list(results.warnings),
    }


def _mark(of: Metric, row: Standing) -> str:
    return MARKS.get(effect(of, row.changes.get(of.name)), "")


def _spent(row: Standing, clock: str) -> list[str]:
    if not row.outcomes:
        return [MISSING] * 3
    return [str(len(row.outcomes)), f"{row.mean('forwards'):,.0f}", f"{row.mean(clock):,.0f}"]


def _budget(study: Study) -> str:
    budget = study.settings.budget
    if not any(each.recipe for each in study.entrants):
        return ""
    spelled = {"denoiser forwards": budget.forwards, "processor seconds": budget.seconds, "seconds": budget.wall}
    nearest = ", to the nearest iteration" if budget.forwards else ""
    return "".join(f"Every training had {most:,.10g} {unit}{nearest}. " for unit, most in spelled.items() if most is not None)
