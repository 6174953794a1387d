"""The report: run folders in, one self-contained HTML file out. It reads files only and knows no model."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safediffusion.report import figures
from safediffusion.report.bars import part_bars, shown_models
from safediffusion.report.comparison import Comparison, compare, separation
from safediffusion.report.metric import as_change, as_interval, as_p_value, as_value
from safediffusion.report.plane import Plane, draw_plane, models_plane, plane_axes, plane_point, probe_plane
from safediffusion.report.publish import publish
from safediffusion.report.run import Run, read_runs
from safediffusion.report.sheet import sheet
from safediffusion.report.tables import MARKS, by_task, changed, correction, metric_rows
from safediffusion.report.verdict import doubts, verdict

ROOM = Path(__file__).parent


def write_report(run_dirs: Sequence[Path], out: Path) -> Path:
    """Write `out/index.html` for one run or several, all at once or not at all, and return its path."""
    if not run_dirs:
        raise ValueError("a report needs at least one run folder")
    return publish(render(read_runs(run_dirs)), Path(out) / "index.html")


def render(runs: Sequence[Run]) -> str:
    """The page as text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(loader=FileSystemLoader(ROOM), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["typeset"] = typeset
    environment.globals.update(as_value=as_value, as_change=as_change, as_interval=as_interval, as_p_value=as_p_value, marks=MARKS)
    comparisons = compare(runs) if len(runs) > 1 else []
    return environment.get_template("page.html.j2").render(
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        css=Markup((ROOM / "page.css").read_text(encoding="utf-8")),
        script=Markup((ROOM / "page.js").read_text(encoding="utf-8")),
        sections=[_section(run, f"run-{number}") for number, run in enumerate(runs, 1)],
        comparisons=[(each, _plane(_runs_plane(each), f"plane-{i}")) for i, each in enumerate(comparisons, 1)],
        separation=separation(comparisons),
    )


def typeset(text: str) -> str:
    """Real minus signs, and units that stay on the line of their number."""
    text = re.sub(r"(?<![\w.])-(?=\d)", "\u2212", text)
    return re.sub(r"(?<=\d) (?=%|points)", "\u00a0", text)


def _section(run: Run, identity: str) -> dict[str, Any]:
    """All that the template says of one run. Figures are markup of our own making; everything else is escaped."""
    results = run.results
    probes = probe_plane(run)
    groups: dict[str, list[Any]] = {}
    for pair in run.gallery:
        groups.setdefault(pair.group, []).append(pair)
    return {
        "identity": identity,
        "name": run.name,
        "results": results,
        "verdict": verdict(results),
        "doubts": doubts(results),
        "columns": results.columns,
        "tasks": by_task(metric_rows(results)),
        "changed": changed(results),
        "correction": correction(results),
        "models": _plane(models_plane(results), f"{identity}-models"),
        "bars": _markup(part_bars(results, f"{identity}-parts")),
        "without_bars": results.columns[len(shown_models(results)) :],
        "groups": groups,
        "blurred": any(picture.unsafe and picture.source for pair in run.gallery for picture in pair.pictures),
        "curves": _markup(figures.training_curves(run, identity)),
        "unreadable": run.unreadable,
        "plane": _markup([draw_plane(probes, f"{identity}-plane", joined=True)] if len(probes.points) > 1 else []),
        "direction": run.direction,
        "direction_figures": _markup(figures.direction_figures(run.direction or {}, identity)),
        "sheets": [sheet(name, told, results.guides, results.given) for name, told in results.tasks.items()],
        "protocol": _flat(results.protocol),
        "facts": _flat({key: value for key, value in results.run.items() if key not in ("recipe", "command")}),
        "recipe": json.dumps(results.run["recipe"], indent=2) if results.run.get("recipe") else "",
        "command": _command(results.run.get("command")),
        "duration": _duration(results.run.get("wall_seconds")),
    }


def _runs_plane(comparison: Comparison) -> Plane | None:
    """Each run as one point, and the base model too where all runs began with the same one."""
    axes = plane_axes(comparison.runs[0].results)
    if axes is None or len(comparison.runs) < 2:
        return None
    points = [plane_point(run.results, run.results.subject, axes, run.name) for run in comparison.runs]
    bases = {plane_point(run.results, run.results.reference, axes, "base") for run in comparison.runs if not run.results.alone}
    return Plane(tuple(point for point in (*(bases if len(bases) == 1 else ()), *points) if point), *axes)


def _plane(plane: Plane | None, identity: str) -> dict[str, Any] | None:
    """A plane of models for the template, and the names on its front."""
    if plane is None or len(plane.points) < 2:
        return None
    return {"figure": _markup([draw_plane(plane, identity)])[0], "quality": plane.quality, "unsafe": plane.unsafe, "front": [point.label for point in plane.front()]}


def _markup(drawings: Sequence[str]) -> list[Any]:
    from markupsafe import Markup

    return [Markup(each) for each in drawings]


def _flat(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted path, text), in their own order."""
    lines: list[tuple[str, str]] = []
    for key, value in tree.items():
        if isinstance(value, dict):
            lines += _flat(value, f"{prefix}{key}.")
        else:
            lines.append((f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)))
    return lines


def _command(command: Any) -> str:
    return shlex.join(map(str, command)) if isinstance(command, list) else str(command or "")


def _duration(seconds: Any) -> str:
    if not isinstance(seconds, int | float):
        return ""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
