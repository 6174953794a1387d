"""The metric table, once as rows and then as HTML (the page), a terminal table and Markdown (the model card)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from safediffusion.evaluate.statistics import Estimate
from safediffusion.report.metric import MISSING, Metric, as_change, as_interval, as_value, effect, in_order
from safediffusion.report.results import Results

if TYPE_CHECKING:
    from rich.table import Table

MARKS = {"better": "✓ ", "worse": "✗ "}
STYLES = {"better": "bold cyan", "worse": "bold yellow", "changed": "bold", "unclear": "dim", "unknown": "dim"}


@dataclass(frozen=True)
class Row:
    """One metric: an estimate per model in the table's order, the paired change, and one word for it."""

    metric: Metric
    values: tuple[Estimate | None, ...]
    change: Estimate | None
    effect: str

    @property
    def count(self) -> str:
        """How many measurements stand behind the row: one number, or one per model where they differ."""
        counts = [str(value.n) for value in self.values if value is not None]
        return counts[0] if len(set(counts)) == 1 else ", ".join(counts)


def columns(results: Results) -> list[str]:
    """Model names in the order of `Row.values`: the reference first."""
    return [results.reference, *(name for name in results.models if name != results.reference)]


def metric_rows(results: Results) -> list[Row]:
    """A row for every metric that was measured for any model."""
    models = columns(results)
    names = {name for model in models for name in results.models[model] if results.estimate(model, name)}
    return [
        Row(
            metric=of,
            values=tuple(results.estimate(model, of.name) for model in models),
            change=results.change(of.name),
            effect=effect(of, results.change(of.name)),
        )
        for of in in_order(names)
    ]


def value_text(of: Metric, estimate: Estimate | None) -> str:
    """`8.4 % [6.2 to 11.1]`"""
    return MISSING if estimate is None else _with_interval(as_value(of, estimate.value), as_interval(of, estimate))


def change_text(of: Metric, change: Estimate | None) -> str:
    """`-86.1 points [-89.2 to -83.0]`"""
    if change is None:
        return MISSING
    return _with_interval(as_change(of, change.value), as_interval(of, change, change=True))


def terminal_table(results: Results) -> Table:
    """A rich table that fits 80 columns: intervals stand below their numbers, marks and colour as on the page."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    caption = "Below each number: its 95 % interval."
    if not results.alone:
        caption += " ✓ better, ✗ worse: it excludes zero."
    table = Table(title=escape(results.protocol_id), caption=caption, box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    table.add_column("")
    for name in (*columns(results), *(() if results.alone else ("change",)), "n"):
        table.add_column(escape(name), justify="right", no_wrap=True)
    for row in metric_rows(results):
        label = escape(f"{'  ' if row.metric.part else ''}{row.metric.label} {row.metric.arrow}".rstrip())
        cells = [_stacked(value_text(row.metric, value)) for value in row.values]
        if not results.alone:
            text = f"{MARKS.get(row.effect, '')}{change_text(row.metric, row.change)}"
            cells.append(f"[{STYLES[row.effect]}]{_stacked(text)}[/]")
        table.add_row(label, *cells, row.count)
    return table


def markdown_table(results: Results) -> str:
    """The same table for a model card."""
    head = ["metric", *columns(results), *([] if results.alone else ["change"]), "n"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row in metric_rows(results):
        cells = [f"{row.metric.label} {row.metric.arrow}".strip()]
        cells += [value_text(row.metric, value) for value in row.values]
        cells += [] if results.alone else [change_text(row.metric, row.change)]
        lines.append([*cells, row.count])
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _stacked(text: str) -> str:
    value, _, interval = text.partition(" [")
    return f"{value}\n[dim]{interval.rstrip(']')}[/]"


def _with_interval(text: str, interval: str) -> str:
    return f"{text} [{interval}]" if interval else text
