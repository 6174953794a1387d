"""`safediffusion generate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safediffusion.cli import options

if TYPE_CHECKING:
    from safediffusion.types import Prompt

EXAMPLES = """
[bold]Examples[/bold]

safediffusion generate pictograms --prompt "a red circle left of a blue star" --out pictures

safediffusion generate runs/pictograms --prompts prompts.txt --samples 4 --out pictures

safediffusion generate ./my-model --prompt "a harbour at dawn" --steps 30 --guidance 7.5 --dtype bfloat16 --out pictures

safediffusion generate ./flux --prompt "a harbour at dawn" --dtype bfloat16 --quantise nf4 --text-encoders drop --out pictures

safediffusion generate pictograms --prompt "a dangerous picture of a ring" --guide sld --guide-set concept="a dangerous picture" --out safer
"""


def command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            show_default=False,
            help="A diffusers folder, run folder, hub id (pinned as org/name@REVISION), `pictograms[-flow]`, BASE+LORA, BASE+UNET.safetensors or one-file checkpoint.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the PNG files and of manifest.jsonl; the same command again adds what is missing.", show_default=False)],
    prompt: Annotated[list[str] | None, typer.Option(help="What to paint; may be given more than once.", show_default=False)] = None,
    prompts: Annotated[Path | None, typer.Option(metavar="FILE", help="A .txt, .jsonl or .csv file of prompts.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(help="Of a prompt's first picture; the next one has the next seed.", min=0)] = 0,
    samples: Annotated[int, typer.Option(help="Pictures per prompt.", min=1)] = 1,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 25,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance; 1 is none.", show_default="5; for FLUX, which does without, 1")] = None,
    size: Annotated[int | None, typer.Option(help="Pixels of a side.", show_default="the model's own", min=8)] = None,
    batch_size: options.BatchSize = "auto",
    dtype: options.Dtype = "float32",
    quantise: options.Quantise = "none",
    text_encoders: options.TextEncoders = "keep",
    guide: Annotated[
        str | None,
        typer.Option(metavar="GUIDE", help="Steer while painting: sld (Safe Latent Diffusion), reward, or a TOML file with \\[guide].", show_default=False),
    ] = None,
    guide_set: options.GuideSet = None,
    device: options.Device = None,
) -> None:
    """Paint pictures. Prompts are screened first; a picture depends on its prompt and seed alone."""
    from safediffusion import build
    from safediffusion.cli.terminal import pictures_at_once, progress_console
    from safediffusion.data.prompts import read_prompts
    from safediffusion.errors import UserError
    from safediffusion.generation import Setting, generate
    from safediffusion.guided import load_guide
    from safediffusion.policies.settings import Held
    from safediffusion.policies.variant import variant
    from safediffusion.progress import bars
    from safediffusion.subjects import locate

    if prompts is None and not prompt:
        raise UserError('there is nothing to paint; give --prompt "..." or --prompts FILE')
    asked = [*_own(prompt or ()), *(read_prompts(prompts) if prompts else ())]
    batch = pictures_at_once(batch_size)
    setting = Setting(steps, guidance, size, Held(dtype, quantise, text_encoders), load_guide(guide, guide_set or ()))
    at = build.device(device)  # first: under a launcher it finds the other processes, and one of them converts for all
    found = variant(model, locate)
    with bars(progress_console()) as progress:
        done = generate(found, asked, out, setting=setting, seed=seed, samples=samples, batch=batch, device=at, progress=progress)
    typer.echo(f"{out} holds the {done.painted + done.there_before} pictures: {done.painted} new, {done.there_before} there before")
    if done.refused:
        typer.echo(f"{done.refused} of {len(asked)} prompts were refused by the prompt screen")


def _own(texts: Sequence[str]) -> list[Prompt]:
    """The prompts of the command line."""
    from safediffusion.data.prompts import text_of
    from safediffusion.errors import UserError
    from safediffusion.types import Prompt

    if any(not text.strip() for text in texts):
        raise UserError("--prompt is empty; say what to paint")
    try:
        return [Prompt(text_of(text)) for text in texts]
    except ValueError as error:
        raise UserError(f"--prompt: {error}") from None
