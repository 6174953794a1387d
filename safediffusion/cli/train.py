"""`safediffusion train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = """
[bold]Examples[/bold]

safediffusion train recipes/pictograms.toml --out runs/pictograms

safediffusion train recipes/sd15.toml model=./my-model steps=200 reward.alpha=0.4 --out runs/mine

safediffusion train recipes/sd15.toml --dry-run
"""


def command(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.toml", help="What to train, on what, and how.", show_default=False)],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Settings that differ from the recipe.", show_default=False)] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; the same command again resumes it.", show_default=False)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the whole recipe, defaults included, and what it needs, and stop.")] = False,
) -> None:
    """Post-train a model by a recipe. Ends with the best checkpoint as a diffusers folder in OUT/model."""
    from safediffusion.cli.terminal import progress_console
    from safediffusion.config import dump
    from safediffusion.errors import UserError
    from safediffusion.training import load_recipe, post_train

    resolved = load_recipe(recipe, overrides or ())
    if dry_run:
        from safediffusion.cost.plan import outline
        from safediffusion.hub import local_model

        local_model(resolved.model, resolved.revision)
        typer.echo(dump(resolved), nl=False)
        for line in outline(resolved).splitlines():
            typer.echo(f"# {line}")
        return
    if out is None:
        raise UserError("--out is missing: name the folder of the run, such as --out runs/first")
    trained = post_train(resolved, out, command=["safediffusion", "train", str(recipe), *(overrides or ()), "--out", str(out)], console=progress_console())
    typer.echo(f"{trained.model} holds {trained.origin}, after {trained.iterations} iterations in {trained.spent}")
