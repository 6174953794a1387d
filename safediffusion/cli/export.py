"""`safediffusion export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

EXAMPLES = """
[bold]Examples[/bold]

safediffusion export runs/pictograms --to models/safer-pictograms

safediffusion export runs/sd15 --lora --to models/safer-lora

safediffusion export runs/sd15 --checkpoint last --license creativeml-openrail-m --to models/sd15-last
"""


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a `safediffusion train` or `demo`.", show_default=False)],
    to: Annotated[Path, typer.Option(metavar="DIR", help="A new folder, or one of an earlier export.", show_default=False)],
    lora: Annotated[bool, typer.Option("--lora", help="Only the adapters, for `load_lora_weights`; of a run with policy.train = lora.")] = False,
    checkpoint: Annotated[Literal["best", "last"] | None, typer.Option(help="Whose weights.", show_default="best where probes found one, else last")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, typer.Option(help="Of the trained denoiser's weights.", show_default="that of the base model's files")
    ] = None,
    license: Annotated[str | None, typer.Option(help="For the model card.", show_default="that of pictograms, else `other`")] = None,
) -> None:
    """Write a trained model as a diffusers folder, or as LoRA weights, with a model card."""
    from safediffusion.errors import UserError
    from safediffusion.hub import EMBEDDED_MODELS
    from safediffusion.measurement import results_of
    from safediffusion.report.card import model_card, write_card
    from safediffusion.training import export_run, open_run

    if lora and dtype is not None:
        raise UserError("--dtype is of a whole model; adapters are written as they were trained, in float32")
    recipe, policy = open_run(run)
    origin = export_run(run, policy, to, checkpoint, lora, dtype)
    # Adapters have no weights of the whole to compare; without --checkpoint they are those of the measured model.
    results = results_of(run, None if lora and checkpoint is None else to)
    embedded = recipe.model in EMBEDDED_MODELS
    card = model_card(results, title=to.resolve().name, license=license or ("apache-2.0" if embedded else "other"), base_model=None if embedded else recipe.model)
    write_card(card, to)
    typer.echo(f"{to} holds {origin}" + ("" if results else "; nothing in the run measured these weights, so the model card has no numbers"))
