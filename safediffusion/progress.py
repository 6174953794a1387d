"""Bars of long work where a terminal draws them; where none does, such as in a log, a plain line now and then."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

PAUSE = 60.0  # seconds between two lines
_WINDOW = 3600.0  # seconds whose pace foretells the rest: of rich's own 30 nothing is left where a step takes longer


@dataclass(eq=False)
class Bars:
    """What rich's Progress shows; a task's field `note` stands at the end, as far as there is room."""

    drawn: Progress
    _said: float = field(default_factory=time.monotonic, init=False)

    def add_task(self, description: str, **fields: Any) -> TaskID:
        return self.drawn.add_task(description, **fields)

    def start_task(self, task: TaskID) -> None:
        self.drawn.start_task(task)

    def update(self, task: TaskID, **changes: Any) -> None:
        self.drawn.update(task, **changes)
        self._say(task)

    def advance(self, task: TaskID, count: float = 1) -> None:
        self.update(task, advance=count)

    def _say(self, which: TaskID) -> None:
        console = self.drawn.console
        if console.is_terminal or console.is_jupyter or console.quiet or time.monotonic() < self._said + PAUSE:
            return
        self._said, task = time.monotonic(), next(each for each in self.drawn.tasks if each.id == which)
        left = "" if task.time_remaining is None else f", about {_clock(task.time_remaining)} left"
        note = f"; {task.fields['note']}" if task.fields.get("note") else ""
        console.print(f"{task.description}: {_count(task.completed)} of {_count(task.total or 0)} after {_clock(task.elapsed or 0)}{left}{note}", markup=False)


@contextmanager
def bars(console: Console | None = None) -> Iterator[Bars]:
    """Descriptions, bars, counts, the time that each took and takes. `console` None shows nothing."""
    whole = [Column(no_wrap=True) for _ in range(4)]  # which a narrow terminal does not cut; it cuts the note
    parts = BarColumn(20, table_column=whole[0]), MofNCompleteColumn(table_column=whole[1])
    clocks = TimeElapsedColumn(table_column=whole[2]), TimeRemainingColumn(table_column=whole[3])
    columns: Any = (TextColumn("{task.description}"), *parts, *clocks, _Note())
    with Progress(*columns, console=console or Console(quiet=True), speed_estimate_period=_WINDOW) as drawn:
        yield Bars(drawn)


class _Note:
    """A column of rich's Progress."""

    def get_table_column(self) -> Column:
        return Column()

    def __call__(self, task: Task) -> Text:
        return Text(task.fields.get("note", ""), no_wrap=True, overflow="ellipsis")


def _count(number: float) -> str:
    return f"{round(number, 1):,.10g}"


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
