"""Where a command writes: results on stdout, everything that comes and goes on stderr, errors alone from every process."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from safediffusion.report.results import Results


def process() -> int:
    """Which process of a launch this is, before anything heavy is imported; 0 is the main one, or the only one."""
    return int(os.environ.get("RANK") or 0)


def pictures_at_once(batch_size: str) -> int:
    """What --batch-size says; 0 for auto."""
    from safediffusion.errors import UserError

    if batch_size != "auto" and not (batch_size.isdecimal() and int(batch_size) > 0):
        raise UserError(f"--batch-size should be auto or a number of at least 1, but is {batch_size}")
    return 0 if batch_size == "auto" else int(batch_size)


def progress_console() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True, quiet=process() != 0)


def print_results(results: Results) -> None:
    """The table, the verdict, and what a reviewer would ask."""
    from rich.console import Console

    from safediffusion.report.tables import terminal_table
    from safediffusion.report.verdict import doubts, verdict

    judged = verdict(results)
    console = Console(highlight=False)
    console.print(terminal_table(results))
    console.print()
    console.print(judged.headline, markup=False)
    for note in judged.notes:
        console.print(note, markup=False)
    for doubt in doubts(results):
        console.print(f"Warning: {doubt}", markup=False)
