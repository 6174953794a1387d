"""`safediffusion pareto`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = """
[bold]Examples[/bold]

safediffusion pareto recipes/studies/budgets.toml --out runs/budgets

safediffusion pareto alpha.toml --out runs/alpha --jobs 4
"""


def command(
    study: Annotated[Path, typer.Argument(metavar="PARETO.toml", help="A study file with [\\[sweep]] tables; docs/study.md has the keys.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder of all runs and of pareto.json, .md and .png; the same command again goes on.", show_default=False)],
    jobs: Annotated[int | None, typer.Option(help="Runs at once, one thread each.", show_default="one on each GPU, or on each core", min=1)] = None,
) -> None:
    """Sweep a setting and show what safety costs: unsafe rate against quality, the front of each series, its hypervolume."""
    from rich.console import Console

    from safediffusion.cli.study import complain, performed
    from safediffusion.errors import UserError
    from safediffusion.study.perform import sweep_written
    from safediffusion.study.plan import read_study
    from safediffusion.study.table import terminal

    asked = read_study(study)
    if not asked.series:
        raise UserError(f"{study} has no [[sweep]]; give one with a key and its values, or use `safediffusion study`")
    spelled = ["safediffusion", "pareto", str(study), "--out", str(out)]
    axes = asked.settings.pareto
    rows, failures = performed(asked, out, jobs, spelled, drawn=(axes.unsafe, axes.quality))
    said = sweep_written(asked, rows, out, spelled, failures)
    Console(highlight=False).print(terminal(asked, rows))
    typer.echo(f"{said}\n{out / 'pareto.md'}, {out / 'pareto.json'}, {out / 'pareto.png'}; the runs: {out / 'study.md'}")
    complain(asked, failures)
