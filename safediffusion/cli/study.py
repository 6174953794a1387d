"""`safediffusion study`."""

from __future__ import annotations

from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.progress import TaskID

    from safediffusion.progress import Bars
    from safediffusion.study.outcome import Standing
    from safediffusion.study.plan import Study

EXAMPLES = """
[bold]Examples[/bold]

safediffusion study recipes/studies/methods.toml --out runs/methods

safediffusion study mine.toml --out runs/mine --jobs 4
"""


def command(
    study: Annotated[Path, typer.Argument(metavar="STUDY.toml", help="Entrants, seeds, budget; docs/study.md has the keys.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder of all runs and of study.json, .md and .png; the same command again goes on.", show_default=False)],
    jobs: Annotated[int | None, typer.Option(help="Runs at once, one thread each.", show_default="one on each GPU, or on each core", min=1)] = None,
) -> None:
    """Train methods beside each other, each from several seeds under one budget, measure every run, and write the comparison."""
    from rich.console import Console

    from safediffusion.study.plan import read_study
    from safediffusion.study.table import terminal

    asked = read_study(study)
    spelled = ["safediffusion", "study", str(study), "--out", str(out)]
    rows, failures = performed(asked, out, jobs, spelled)
    Console(highlight=False).print(terminal(asked, rows))
    typer.echo(", ".join(str(path) for name in ("study.md", "study.json", "study.png") if (path := out / name).is_file()))
    complain(asked, failures)


def performed(asked: Study, out: Path, jobs: int | None, spelled: Sequence[str], drawn: Sequence[str] = ()) -> tuple[list[Standing], dict[str, str]]:
    """All runs under a bar that counts them; an interrupt leaves them to be gone on with."""
    from safediffusion.cli.terminal import progress_console
    from safediffusion.progress import bars
    from safediffusion.study.perform import perform

    with ExitStack() as stack:

        @cache
        def shown() -> tuple[Bars, TaskID]:  # from the first move on: what is refused beforehand has no bar
            bar = stack.enter_context(bars(progress_console()))
            return bar, bar.add_task("runs", total=len(asked.jobs))

        def moved(done: float, note: str) -> None:
            bar, task = shown()
            bar.update(task, completed=done, note=note)

        return perform(asked, out, jobs=jobs, command=spelled, moved=moved, drawn=drawn)


def complain(asked: Study, failures: dict[str, str]) -> None:
    """UserError where a run failed: the others are in the table, and the same command tries the failed ones again."""
    from safediffusion.errors import UserError
    from safediffusion.study.perform import told

    if failures:
        raise UserError(f"{len(failures)} of {len(asked.jobs)} runs failed; " + "; ".join(told(failures)))
