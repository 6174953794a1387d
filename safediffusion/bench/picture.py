"""The result of a bench for the eye: a table for the terminal, a figure for a page."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from safediffusion.bench.clock import PARTS
from safediffusion.bench.standing import Standing
from safediffusion.cost.plan import spelled_number
from safediffusion.cost.room import spelled_bytes

if TYPE_CHECKING:
    from rich.table import Table

_COLOURS = ("#0072b2", "#56b4e9", "#009e73", "#d55e00", "#e69f00", "#999999")  # Okabe and Ito, told apart by the colour-blind


def table(standings: Sequence[Standing]) -> Table:
    """One column per recipe; docs/bench.md defines the rows."""
    from rich.table import Table

    drawn = Table(title="median over repeats", title_justify="left")
    drawn.add_column("")
    for each in standings:
        drawn.add_column(each.name, justify="right")
    rows: list[tuple[str, Callable[[Standing], str]]] = [
        ("images per second", lambda each: spelled_number(each.images_per_second)),
        ("least and most", lambda each: " - ".join(map(spelled_number, each.spread))),
        ("seconds per image", lambda each: spelled_number(each.seconds_per_image)),
        ("processor seconds per image", lambda each: spelled_number(each.cpu_seconds_per_image)),
        *((f"  of it {part}", lambda each, part=part: f"{each.parts[part] / sum(each.parts.values()):.1%}") for part in PARTS),
        ("denoiser forwards per image", lambda each: f"{each.forwards:g}"),
        ("  as predicted", lambda each: "-" if each.predicted is None else f"{each.predicted:g}"),
        ("GFLOP per second", lambda each: "-" if each.flops is None else spelled_number(each.flops / 1e9)),
        ("  of the best matrix product", lambda each: "-" if each.share is None else f"{each.share:.0%}"),
        ("peak memory", lambda each: spelled_bytes(each.peak_bytes)),
    ]
    for name, cell in rows:
        drawn.add_row(name, *(cell(each) for each in standings))
    return drawn


def compared(standings: Sequence[Standing]) -> list[str]:
    """How long a picture of each other recipe takes against one of the first, in a sentence each."""
    first, *others = standings
    return [f"{each.name} takes {each.seconds_per_image / first.seconds_per_image:.2g} times as long per image as {first.name}" for each in others]


def figure(standings: Sequence[Standing], title: str) -> bytes:
    """PNG: a bar per recipe of seconds per image, stacked by where they go."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sheet = Figure(figsize=(8, 1.6 + 0.6 * len(standings)), layout="constrained", dpi=150)
    FigureCanvasAgg(sheet)
    axes = sheet.add_subplot()
    names = [each.name for each in standings]
    left = [0.0] * len(standings)
    for part, colour in zip(PARTS, _COLOURS, strict=True):
        widths = [each.parts[part] for each in standings]
        axes.barh(names, widths, left=left, color=colour, label=part)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for place, each in enumerate(standings):
        axes.annotate(f"{spelled_number(each.images_per_second)} images/s", (left[place], place), (5, 0), textcoords="offset points", va="center")
    axes.set_xlim(0, 1.25 * max(left))
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("seconds per image")
    axes.set_title(title, loc="left", fontsize=10)
    axes.legend(ncols=len(PARTS), loc="upper center", bbox_to_anchor=(0.5, -0.35), frameon=False, fontsize=8)
    file = io.BytesIO()
    sheet.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()
