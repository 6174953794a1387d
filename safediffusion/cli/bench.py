"""`safediffusion bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

EXAMPLES = """
[bold]Examples[/bold]

safediffusion bench pictograms --recipes demo,paper algorithm.prompts=4 --out runs/bench

safediffusion bench sd15 --recipes recipes/sd15.toml,paper --dtype bfloat16 --batch 8 --device cuda --out runs/bench-sd15

safediffusion bench sdxl --recipes recipes/sdxl.toml --batch 1 --out runs/bench-sdxl

safediffusion bench ./my-model --recipes my.toml --size 256 --repeats 5
"""


def command(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="A diffusers folder, a hub id, `pictograms`, or a shape at random weights: `sd15`, `sd21`, `sdxl`, `sd35-medium`, `flux-dev`.",
            show_default="the recipe's own",
        ),
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Settings of all recipes.", show_default=False)] = None,
    recipes: Annotated[
        str, typer.Option(metavar="NAME_OR_FILE,...", help="By commas; `demo` and `paper` come with the package. All are held against the first.")
    ] = "demo,paper",
    repeats: Annotated[int, typer.Option(help="Iterations of each recipe, taken in turns after a warm-up.", min=1)] = 3,
    out: Annotated[Path | None, typer.Option(help="Folder of bench.json and bench.png.", show_default=False)] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; CUDA_VISIBLE_DEVICES chooses among several.", show_default="the best there is")] = None,
    size: Annotated[int | None, typer.Option(help="Pixels of a side.", show_default="the model's own", min=8)] = None,
    batch: Annotated[int | None, typer.Option(help="Pictures per forward.", show_default="the recipe's own", min=0)] = None,
    dtype: Annotated[Literal["float32", "bfloat16"] | None, typer.Option(help="Arithmetic of the denoiser.", show_default="the recipe's own")] = None,
) -> None:
    """Measure the speed of recipes side by side: images per second, where the time goes, how near to what the machine can do."""
    from rich.console import Console

    from safediffusion.bench.contestants import contestants
    from safediffusion.bench.picture import compared, table
    from safediffusion.bench.run import bench
    from safediffusion.cli.terminal import progress_console
    from safediffusion.progress import bars

    if model and "=" in model and not Path(model).exists():  # an override, and every recipe has its own model
        model, overrides = None, [model, *(overrides or ())]
    names = [name.strip() for name in recipes.split(",") if name.strip()]
    asked = {"policy.image_size": size, "optimizer.batch": batch, "policy.dtype": dtype}
    changed = [*(f"{key}={value}" for key, value in asked.items() if value is not None), *(overrides or ())]
    spelled = ["safediffusion", "bench", *([model] if model else []), "--recipes", recipes, "--repeats", str(repeats), *changed]
    spelled += [*(["--device", device] if device else []), *(["--out", str(out)] if out else [])]
    with progress_console().status("reading recipes; a shaped model is made on first use"):
        field = contestants(names, model, changed)
    with bars(progress_console()) as progress:
        task = progress.add_task("iterations", total=len(names) * (repeats + 1))

        def passed(name: str) -> None:
            progress.update(task, advance=1, description=f"after {name}")

        standings = bench(field, repeats=repeats, device=device, out=out, command=spelled, passed=passed)
    console = Console(highlight=False)
    console.print(table(standings))
    for sentence in compared(standings):
        console.print(sentence, markup=False)
    if out is not None:
        typer.echo(f"{out / 'bench.json'}, {out / 'bench.png'}")
