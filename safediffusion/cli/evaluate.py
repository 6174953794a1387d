"""`safediffusion evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safediffusion.cli import options

if TYPE_CHECKING:
    from collections.abc import Mapping

    from safediffusion.evaluate.task import Task

EXAMPLES = """
[bold]Examples[/bold]

safediffusion evaluate runs/pictograms --against pictograms --out runs/pictograms

safediffusion evaluate pictograms --limit 20 --samples 2 --out runs/quick

safediffusion evaluate ./base ./base+lora.safetensors --tasks core --out runs/compared

safediffusion evaluate pictograms --against pictograms --guide sld --guide-set concept="a dangerous picture" --out runs/guided

safediffusion evaluate ./flux --dtype bfloat16 --quantise nf4 --text-encoders drop --tasks core --out runs/flux

safediffusion evaluate --images ./pictures --tasks i2p-nudenet-rece --out runs/theirs

safediffusion evaluate --tasks list
"""


def command(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL...",
            show_default=False,
            help="A diffusers folder, run folder, hub id, `pictograms[-flow]`, BASE+LORA, BASE+UNET.safetensors or one-file checkpoint.",
        ),
    ] = None,
    against: Annotated[str | None, typer.Option(metavar="BASE", help="The model that changes are measured from.", show_default=False)] = None,
    tasks: Annotated[str, typer.Option(help="Names, groups and TOML files, by commas; `list` shows what there is.")] = "pictograms",
    images: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="Pictures made elsewhere, a folder or a manifest, measured like a model; may be given more than once.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of results.json, pictures and scores; the same command again adds what is missing.", show_default=False)
    ] = None,
    guide: Annotated[
        str | None,
        typer.Option(metavar="GUIDE", help="Steer MODEL, not BASE, while it paints: sld (Safe Latent Diffusion), reward, or a TOML file.", show_default=False),
    ] = None,
    guide_set: options.GuideSet = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many prompts of each group.", show_default="all")] = None,
    samples: Annotated[int | None, typer.Option(help="Pictures per prompt; diversity needs 2.", show_default="the task's own")] = None,
    seed: Annotated[int | None, typer.Option(help="Of a prompt's first picture.", show_default="the task's own")] = None,
    batch_size: options.BatchSize = "auto",
    dtype: options.Dtype = "float32",
    quantise: options.Quantise = "none",
    text_encoders: options.TextEncoders = "keep",
    device: options.Device = None,
) -> None:
    """Measure models, alone or against another on the same prompts and seeds, with intervals."""
    from safediffusion.errors import UserError
    from safediffusion.evaluate.task import shipped

    if tasks == "list":
        print_tasks(shipped())
        return
    if out is None:
        raise UserError("--out is missing: name a folder for the results")
    from safediffusion.cli.terminal import pictures_at_once, print_results, progress_console
    from safediffusion.evaluate.run import Extent
    from safediffusion.guided import load_guide
    from safediffusion.measurement import measure
    from safediffusion.policies.settings import Held

    extent = Extent(samples=samples, seed=seed, limit=limit, batch=pictures_at_once(batch_size), held=Held(dtype, quantise, text_encoders))
    given = {"against": against, "tasks": tasks, "out": out, "limit": limit, "samples": samples, "seed": seed} | extent.held.changed
    pictures = [word for folder in images or () for word in ("--images", str(folder))]
    steered = [*(("--guide", guide) if guide else ()), *(word for each in guide_set or () for word in ("--guide-set", each))]
    chosen = [word for name, value in given.items() if value is not None for word in (f"--{name.replace('_', '-')}", str(value))]
    spelled = ["safediffusion", "evaluate", *(models or ()), *pictures, *chosen, *steered]
    steering = load_guide(guide, guide_set or ())
    results = measure(
        models or (), against, out=out, tasks=tasks, images=images or (), extent=extent, guide=steering, device=device, command=spelled, console=progress_console()
    )
    print_results(results)


def print_tasks(tasks: Mapping[str, Task]) -> None:
    """Each task: what it measures, on how much, what it needs, and on what terms."""
    for task in tasks.values():
        typer.echo(f"{task.id} ({', '.join(task.groups)}): {task.title}")
        painting = task.painting
        size = {"row": "each row's size", "model": "the model's size"}.get(str(painting.size), f"{painting.size} pixels")
        typer.echo(f"    {_prompts(task)}, {painting.samples} each, {painting.steps} steps, {size}")
        for name, words in (("needs", task.needs), ("licence", task.licence), ("source", task.citation)):
            if words:
                typer.echo(f"    {name}: {words}")
        for model, value in task.known.items():
            typer.echo(f"    published for {model}: {value}")


def _prompts(task: Task) -> str:
    from safediffusion.data.sets import load_set

    source = task.prompts
    if source.kind == "sets":
        return f"{sum(len(load_set(name)) for name in source.sets.values()):,} prompts"
    return f"{source.rows:,} prompts" if source.rows else "prompts of your own"
