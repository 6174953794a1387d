"""Learning curves of a study: what the probes measured against what was spent, by denoiser forwards and by processor time."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from safediffusion.report.figures import STYLE
from safediffusion.report.metric import metric
from safediffusion.study.outcome import Outcome, Standing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito, told apart by the colour-blind; with more lines than colours the dashes change.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000")
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)))
MEASURES = ("unsafe_rate", "composition", "diversity")
_CLOCKS = {"cpu_seconds": "processor seconds of training", "seconds": "seconds of training"}


def curves(rows: Sequence[Standing], title: str, clock: str) -> bytes:
    """PNG: a thin line for each run and a thick one for the median of a method's runs; `clock` is one of `outcome.CLOCKS`."""
    spending = (("forwards", "denoiser forwards"), (clock, _CLOCKS[clock]))
    drawn = [row for row in rows if any(each.probes for each in row.outcomes)]
    with sheet(13.0, 7.5 + 0.22 * (len(drawn) // 4), len(spending), len(MEASURES)) as (figure, axes, file):
        for line, (spent, label) in enumerate(spending):
            for column, name in enumerate(MEASURES):
                of, axis = metric(name), axes[line][column]
                for row, style in zip(drawn, styles(), strict=False):
                    _draw(axis, row.outcomes, spent, name, 100.0 if of.share else 1.0, row.label, style)
                axis.set_xlabel(label)
                axis.set_ylim(*((-3, 103) if of.share else (0, None)))
                if line == 0:
                    axis.set_title(of.label + (", %" if of.share else ""))
        handles, labels = axes[0][0].get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, loc="outside lower center", ncols=4)
        if title:
            figure.suptitle(title, x=0.01, ha="left", weight="bold")
    return file.getvalue()


@contextmanager
def sheet(width: float, height: float, lines: int, across: int) -> Iterator[tuple[Figure, Any, io.BytesIO]]:
    """A figure in the house style with its axes by line and column; after the block the file holds the PNG."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    file = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained", dpi=110)
        FigureCanvasAgg(figure)
        yield figure, figure.subplots(lines, across, squeeze=False), file
        figure.savefig(file, format="png", metadata={"Software": None})


def styles() -> Iterator[dict[str, Any]]:
    """How the lines look, one after the other."""
    return cycle({"color": colour, "linestyle": dash} for dash in DASHES for colour in COLOURS)


def _draw(axis: Axes, outcomes: Sequence[Outcome], spent: str, name: str, factor: float, label: str, style: dict[str, Any]) -> None:
    runs = [np.array([(probe[spent], factor * probe[name]) for probe in each.probes if probe.get(name) is not None]) for each in outcomes]
    runs = [run for run in runs if len(run)]
    for run in runs:
        axis.plot(run[:, 0], run[:, 1], alpha=0.3, linewidth=0.8, **style)
    if runs:
        # As far as all runs go: the median of fewer would jump where one stops early.
        together = np.median([run[: min(map(len, runs))] for run in runs], axis=0)
        axis.plot(together[:, 0], together[:, 1], label=label, marker="o", markersize=3, **style)
