"""`safediffusion evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = """
[bold]Examples[/bold]

safediffusion evaluate runs/pictograms --against pictograms --out runs/pictograms

safediffusion evaluate pictograms --limit 20 --samples 2 --out runs/quick

safediffusion evaluate --tasks list
"""


def command(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="A diffusers folder, a run folder, a hub id, or `pictograms`.", show_default=False)] = None,
    against: Annotated[str | None, typer.Option(metavar="BASE", help="The model that changes are measured from.", show_default=False)] = None,
    tasks: Annotated[str, typer.Option(help="What to measure, by commas; `list` shows what there is.")] = "pictograms",
    out: Annotated[Path | None, typer.Option(help="Folder of results.json, scores.jsonl and the gallery.", show_default=False)] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many prompts of each set.", show_default="all")] = None,
    samples: Annotated[int, typer.Option(help="Pictures per prompt; diversity needs 2.")] = 4,
    seed: Annotated[int, typer.Option(help="Of a prompt's first picture; the next one has the next seed.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Pictures at once; memory, not results.")] = 100,
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda:1.", show_default="the best there is")] = None,
) -> None:
    """Measure a model, alone or against another on the same prompts and seeds, with intervals."""
    from safediffusion.errors import UserError
    from safediffusion.evaluate.tasks import TASKS, check_tasks

    if tasks == "list":
        for name, meaning in TASKS.items():
            typer.echo(f"{name}: {meaning}")
        return
    check_tasks(tasks)
    if model is None or out is None:
        raise UserError("MODEL is missing: name what to measure, such as `pictograms`" if model is None else "--out is missing: name a folder for the results")
    from safediffusion.cli.terminal import print_results, progress_console
    from safediffusion.evaluate.run import Extent
    from safediffusion.measurement import measure

    extent = Extent(samples=samples, seed=seed, limit=limit, batch=batch_size)
    spelled = ["safediffusion", "evaluate", model, *(["--against", against] if against else []), "--tasks", tasks, "--out", str(out)]
    spelled += [*(["--limit", str(limit)] if limit else []), "--samples", str(samples), "--seed", str(seed)]
    results = measure(model, against, out=out, extent=extent, device=device, command=spelled, console=progress_console())
    print_results(results)
