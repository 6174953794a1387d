"""`safediffusion direction`."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from safediffusion.cli import options

if TYPE_CHECKING:
    from safediffusion.rewards.calibrate import Pairs

EXAMPLES = """
[bold]Examples[/bold]

safediffusion direction --out directions/pictograms

safediffusion direction --encoder openai/clip-vit-large-patch14 --anchors broad --safe benign.txt --unsafe unsafe.txt --out directions/vit-l

safediffusion direction --anchors my-anchors.toml --estimator lda --method gated --sample-from pictograms --out directions/mine
"""


def command(
    out: Annotated[Path, typer.Option(help="Folder of direction.safetensors, direction.json and the figures.", show_default=False)],
    encoder: Annotated[str, typer.Option(help="`pictograms`, a CLIPModel folder or hub id, or an HPSv2.1 .safetensors file.")] = "pictograms",
    anchors: Annotated[str | None, typer.Option(help="A shipped set (compact, broad, pictograms) or a .toml file.", show_default="pictograms, or broad")] = None,
    estimator: Annotated[Literal["mean", "unsafe_only", "lda"], typer.Option(help="How the anchors make a direction.")] = "mean",
    method: Annotated[Literal["translation", "projection", "gated"], typer.Option(help="How a target is steered along it.")] = "translation",
    alpha: Annotated[str, typer.Option(help="Length of the shift; `auto` takes the smallest that suffices on pairs.")] = "auto",
    safe: Annotated[str | None, typer.Option(help="Benign prompts to measure on: a set or a file.", show_default=False)] = None,
    unsafe: Annotated[str | None, typer.Option(help="Unsafe prompts to measure on: a set or a file.", show_default=False)] = None,
    pairs: Annotated[Path | None, typer.Option(metavar="DIR", help="Your own pairs of pictures: pairs.jsonl with prompt, safe, unsafe.", show_default=False)] = None,
    sample_from: Annotated[str | None, typer.Option(metavar="MODEL", help="Pairs from this model's own pictures, sorted by the detector.", show_default=False)] = None,
    samples: Annotated[int, typer.Option(help="Pictures per prompt with --sample-from.", min=2)] = 8,
    compare: Annotated[list[str] | None, typer.Option(help="Another anchor set whose cosine with this one is shown; repeatable.", show_default=False)] = None,
    device: options.Device = None,
) -> None:
    """Fit the direction from unsafe to safe, measure it, and say whether training would accept it."""
    from safediffusion import build
    from safediffusion.errors import UserError
    from safediffusion.files import check_writable
    from safediffusion.steering import Study, study, write_study

    if pairs and sample_from:
        raise UserError("--pairs and --sample-from both say which pictures to compare; give one of them")
    if (safe is None) != (unsafe is None):
        raise UserError("a direction is measured on prompts of both kinds; give --safe and --unsafe, or neither")
    strength = _alpha(alpha)
    check_writable(out)
    at, named = build.device(device), anchors or ("pictograms" if encoder == build.PICTOGRAMS else "broad")
    pictures = _pairs(encoder, pairs, sample_from, samples, at)
    asked = Study(encoder, named, estimator, method, strength, safe, unsafe, tuple(compare or ()))
    found = study(asked, pictures, at)
    write_study(found, out)
    _print(found.measures, found.refusal)
    typer.echo(f"{out} holds direction.safetensors, direction.json and the figures")


def _alpha(text: str) -> float | Literal["auto"]:
    from safediffusion.errors import UserError

    if text == "auto":
        return "auto"
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise UserError(f"--alpha should be auto or a number of at least 0, but is {text!r}")
    return value


def _pairs(encoder: str, folder: Path | None, model: str | None, samples: int, device: Any) -> Pairs | None:
    from safediffusion import build
    from safediffusion.rewards.calibrate import Pairs

    if folder is not None:
        from safediffusion.data.pairs import read_pairs

        return Pairs(*read_pairs(folder))
    if model is not None:
        return Pairs(*_sampled(model, samples, device))
    if encoder != build.PICTOGRAMS:
        return None
    from safediffusion.tiny.pairs import render_pairs

    return render_pairs(build.CALIBRATION_PAIRS, seed=0)


def _sampled(model: str, samples: int, device: Any) -> tuple[Any, ...]:
    from safediffusion import build
    from safediffusion.cli.terminal import progress_console
    from safediffusion.evaluate.pairs import sample_pairs, stacked
    from safediffusion.evaluate.pictograms import VALIDATION_SETS, check_size
    from safediffusion.evaluate.pictures import native_side
    from safediffusion.policies.latent import load_policy
    from safediffusion.policies.variant import AS_IT_IS
    from safediffusion.progress import bars
    from safediffusion.subjects import locate

    folder = locate(model)
    check_size(native_side(folder), folder)
    policy = load_policy(folder, AS_IT_IS, device)
    prompts = build.prompts(VALIDATION_SETS["seen"], unsafe=True) + build.prompts(VALIDATION_SETS["implicit"], unsafe=True)
    with bars(progress_console()) as progress:
        task = progress.add_task("painting pairs", total=len(prompts))
        return stacked(sample_pairs(policy, build.judges(device).detector, prompts, samples, 0, lambda count: progress.advance(task, count)))


def _print(measures: dict[str, Any], refusal: str) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if rows := measures["pair_accuracy"]:
        table = Table(title=f"the steered reward on {rows[0]['n']} pairs of pictures")
        for name in ("alpha", "safe picture preferred", "content preferred", ""):
            table.add_column(name, justify="right")
        for row in rows:
            table.add_row(f"{row['alpha']:g}", f"{row['safe_preferred']:.1%}", f"{row['content_kept']:.1%}", "used" if row["alpha"] == measures["alpha"] else "")
        console.print(table)
    for one, other in itertools.combinations(measures["cosines"], 2):
        console.print(f"cosine of {one} and {other}: {measures['cosines'][one][other]:.2f}", markup=False)
    if measures["auc"] is not None:
        console.print(f"AUC of z.v on {measures['auc_prompts_n']} held-out prompts: {measures['auc']:.3f}")
    if measures["alpha"] is not None:
        console.print(f"alpha: {measures['alpha']:g}")
    if refusal:
        console.print(f"training would refuse it: {refusal}", markup=False)
    elif measures["auc"] is None and not measures["pair_accuracy"]:
        console.print("nothing was measured: give --safe and --unsafe for prompts, --pairs or --sample-from for pictures")
    else:
        console.print("training would accept it")
