"""Bars of long work, on a terminal and in a log."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from safediffusion import progress


def shown(monkeypatch: pytest.MonkeyPatch, pause: float, **console: bool) -> str:
    """What three steps of a task look like."""
    monkeypatch.setattr(progress, "PAUSE", pause)
    file = io.StringIO()
    with progress.bars(Console(file=file, width=60, **console)) as bars:
        task = bars.add_task("train", total=4)
        for step in (1, 2, 4):
            bars.update(task, completed=step, note="reward [b] 0.5, and much more than there is room for on a line")
    return file.getvalue()


def test_a_log_has_lines_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    said = " ".join(shown(monkeypatch, 0.0).split())
    assert "train: 1 of 4 after 0:00:00; reward [b] 0.5" in said  # one step foretells nothing
    assert re.search(r"train: 2 of 4 after 0:00:00, about 0:00:0\d left; reward", said)
    assert "of 4 after" not in shown(monkeypatch, 3600.0)


def test_large_counts_are_spelled_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PAUSE", 0.0)
    file = io.StringIO()
    with progress.bars(Console(file=file, width=200)) as bars:
        bars.update(bars.add_task("painting", total=3_000_000), completed=12_345.678)
    assert "painting: 12,345.7 of 3,000,000 after" in file.getvalue()


def test_a_terminal_has_no_lines_and_a_quiet_console_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "of 4 after" not in shown(monkeypatch, 0.0, force_terminal=True)
    assert shown(monkeypatch, 0.0, quiet=True) == ""


def test_a_narrow_terminal_cuts_the_note_and_not_the_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    last = shown(monkeypatch, 3600.0).strip()
    assert re.search(r"4/4 0:00:00 0:00:00 reward.*…$", last)
    assert len(last) <= 60
