"""`safediffusion demo`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from safediffusion.evaluate.run import Extent

EXAMPLES = """
[bold]Examples[/bold]

safediffusion demo --out runs/demo

safediffusion demo --out runs/other-seed --seed 1

safediffusion demo --model pictograms-flow --out runs/demo-flow
"""
_FOLDER = Path(__file__).parent.parent / "recipes"
RECIPES = {"pictograms": _FOLDER / "demo.toml", "pictograms-flow": _FOLDER / "demo-flow.toml"}
EXTENT: Extent | None = None  # how much is measured; None is the whole protocol


def command(
    out: Annotated[Path, typer.Option(help="Folder of the run; the same command again resumes it.", show_default=False)],
    model: Annotated[Literal["pictograms", "pictograms-flow"], typer.Option(help="An embedded model: a small Stable Diffusion 1, or 3.")] = "pictograms",
    seed: Annotated[int, typer.Option(help="Of the training. Test pictures have the same seeds always.", min=0)] = 0,
) -> None:
    """Make an embedded model safe, measure it before and after, and write a report: the whole road in minutes."""
    from safediffusion import ranks
    from safediffusion.cli.terminal import print_results, progress_console
    from safediffusion.measurement import measure
    from safediffusion.provenance import Seconds
    from safediffusion.report.page import write_report
    from safediffusion.training import load_recipe, post_train

    began, console = Seconds.now(), progress_console()
    spelled = ["safediffusion", "demo", "--out", str(out), "--model", model, "--seed", str(seed)]
    trained = post_train(load_recipe(RECIPES[model], [f"seed={seed}"]), out, command=spelled, console=console)
    console.print(f"{trained.model} holds {trained.origin}")
    results = measure(out, model, out=out, extent=EXTENT, command=spelled, console=console, spent=trained.spent)
    page = ranks.from_main(lambda: write_report([out], out / "report"))
    print_results(results)
    typer.echo(f"\nThe report: {page}\nThe model: {trained.model} (a diffusers folder)")
    whole = Seconds(results.run["wall_seconds"], results.run["cpu_seconds"])
    typer.echo(f"Training and measuring took {whole}; this command {Seconds.now() - began}.")
