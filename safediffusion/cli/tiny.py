"""`safediffusion tiny`: the embedded world, rebuilt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = """
[bold]Examples[/bold]

safediffusion tiny build --out rebuilt

safediffusion tiny build --out other-world --seed 1 --work /scratch/other-world
"""
app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help="The embedded world of `pictograms` and `pictograms-flow`: rebuild its models from nothing.")


@app.callback()
def _group() -> None:
    """Keeps `build` a subcommand, though it is the only one."""


@app.command(epilog=EXAMPLES)
def build(
    out: Annotated[Path, typer.Option(help="Folder of the finished models, in the layout that the package ships.", show_default=False)],
    work: Annotated[Path | None, typer.Option(help="Folder of checkpoints and drawn pictures.", show_default="OUT with .work at its end")] = None,
    seed: Annotated[int, typer.Option(help="0 gives the shipped models.", min=0)] = 0,
) -> None:
    """Draw the world and train all its models: three hours or so on two cores. The same command again resumes."""
    from safediffusion.tiny.build import build as build_world

    build_world(out, work or out.with_name(f"{out.name}.work"), seed)
    typer.echo(str(out))
