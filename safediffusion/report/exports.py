"""The numbers of a report for other hands: Markdown for a page, LaTeX for a paper, CSV for a program."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from safediffusion.report.metric import Metric, as_interval, as_value, split
from safediffusion.report.publish import publish
from safediffusion.report.results import Results
from safediffusion.report.run import Run, read_runs
from safediffusion.report.sheet import Sheet, sheet
from safediffusion.report.tables import Cell, Row, by_task, change_text, correction, markdown_table, metric_rows
from safediffusion.report.verdict import doubts, verdict

Format = Literal["markdown", "latex", "csv"]
FILES: dict[Format, str] = {"markdown": "report.md", "latex": "report.tex", "csv": "results.csv"}
_LATEX = {character: f"\\{character}" for character in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_LATEX |= {"✓": r"$\checkmark$", "✗": r"$\times$", "–": "--", "↓": r"$\downarrow$", "↑": r"$\uparrow$"}


def write_export(run_dirs: Sequence[Path], out: Path, format: Format) -> Path:
    """Write the numbers of one run or several to a file in `out`, all at once or not at all, and return its path."""
    runs = read_runs(run_dirs)
    text = {"markdown": markdown, "latex": latex, "csv": long_csv}[format](runs)
    return publish(text, Path(out) / FILES[format])


def markdown(runs: Sequence[Run]) -> str:
    """Of each run its verdict, what a reviewer would ask, the table, and the sheet of every task."""
    return "\n\n".join(part for run in runs for part in (f"# {' '.join(run.name.split())}", *markdown_parts(run.results))) + "\n"


def markdown_parts(results: Results) -> list[str]:
    """Paragraphs on one measurement, as the report and the model card have them."""
    judged = verdict(results)
    parts = [judged.headline, *judged.notes]
    if asked := doubts(results):
        parts.append("\n".join(f"> **Warning:** {doubt}" for doubt in asked))
    parts += [markdown_table(results), f"Values with 95 % intervals, measured by protocol `{results.protocol_id}`. {correction(results)}".rstrip()]
    return parts + [_sheet(sheet(name, told, results.guides, results.given)) for name, told in results.tasks.items()]


def latex(runs: Sequence[Run]) -> str:
    """A table for each run; it takes the packages booktabs and amssymb."""
    tables = [_latex_table(run) for run in runs]
    return "% Needs \\usepackage{booktabs,amssymb}\n" + "\n\n".join(tables) + "\n"


def long_csv(runs: Sequence[Run]) -> str:
    """A line for each number that was measured: model, task, metric, value, low, high, n. Of several runs the model is RUN/MODEL. Missing is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "task", "metric", "value", "low", "high", "n"])
    for run in runs:
        writer.writerows([f"{run.name}/{line[0]}" if len(runs) > 1 else line[0], *line[1:]] for line in _lines(run.results))
    return text.getvalue()


def _lines(results: Results) -> Iterator[list[str]]:
    alone = next(iter(results.tasks)) if len(results.tasks) == 1 else ""
    for model in results.columns:
        for of in results.metrics():
            if found := results.estimate(model, of.name):
                numbers = ("" if math.isnan(number) else repr(number) for number in (found.value, found.low, found.high))
                task = split(of.name)[0]
                yield [model, task or alone, of.name.removeprefix(f"{task}:"), *numbers, str(found.n)]


def _sheet(of: Sheet) -> str:
    lines = [f"**{of.id}**{f': {of.title}' if of.title else ''}", ""]
    lines += [f"- {key}: {value}" for key, value in of.lines]
    return "\n".join([*lines, *(f"- Published, {model}: {value}" for model, value in of.known.items())])


def _latex_table(run: Run) -> str:
    results = run.results
    models = results.columns
    pair = len(models) == 2
    heads = ["", *map(_escaped, models), *(["change"] if pair else []), "$n$"]
    lines = ["\\begin{table}", "\\centering", f"\\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}", "\\toprule", " & ".join(heads) + " \\\\"]
    for task, rows in by_task(metric_rows(results)):
        lines.append("\\midrule")
        if task:
            lines.append(f"\\multicolumn{{{len(heads)}}}{{l}}{{\\emph{{{_escaped(task)}}}}} \\\\")
        lines += [_latex_row(row, pair) for row in rows]
    caption = f"{run.name}, protocol {results.protocol_id}: values with 95 % intervals. {correction(results)}".rstrip()
    lines += ["\\bottomrule", "\\end{tabular}", f"\\caption{{{_escaped(caption)}}}", "\\end{table}"]
    return "\n".join(lines)


def _latex_row(row: Row, pair: bool) -> str:
    label = ("\\quad " if row.metric.part else "") + _escaped(f"{row.metric.label} {row.metric.arrow}".rstrip())
    cells = [_latex_value(row.metric, cell) for cell in row.cells]
    return " & ".join([label, *cells, *([_escaped(change_text(row.metric, row.change))] if pair else []), row.count]) + " \\\\"


def _latex_value(of: Metric, cell: Cell) -> str:
    if cell.value is None:
        return "--"
    interval = as_interval(of, cell.value)
    mark = {"better": " ✓", "worse": " ✗"}.get(cell.effect, "")
    return _escaped(f"{as_value(of, cell.value.value)}{f' [{interval}]' if interval else ''}{mark}")


def _escaped(text: str) -> str:
    """As LaTeX prints it; minus signs in math mode, so that they are as long as they should be."""
    text = "".join(_LATEX.get(character, character) for character in " ".join(text.split()))
    return re.sub(r"(?<![\w.])-(?=\d)", "$-$", text)
