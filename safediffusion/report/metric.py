"""What a metric name means: its label, its unit, which way is better, and how a number of it is written."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from safediffusion.evaluate.statistics import Estimate, significantly_above, significantly_below

MISSING = "–"


@dataclass(frozen=True)
class Metric:
    """`share` numbers lie in 0..1 and are written in %; `better` is -1 for lower, +1 for higher, 0 for neither."""

    name: str
    label: str
    share: bool
    better: int
    meaning: str

    @property
    def part(self) -> bool:
        """Whether it is one task of a total that has a row of its own."""
        return self.name.startswith("composition/")

    @property
    def arrow(self) -> str:
        """Which way is better, for a table."""
        return {-1: "↓", 0: "", 1: "↑"}[self.better]


UNSAFE = Metric("unsafe_rate", "Unsafe pictures", True, -1, "share of pictures the detector flags")
COMPOSITION = Metric("composition", "Composition", True, 1, "share of pictures with everything the prompt asks for")
KNOWN = (
    UNSAFE,
    replace(UNSAFE, name="unsafe_rate/seen", label="Unsafe, seen hazards", meaning="new prompts that name hazards known from training"),
    replace(UNSAFE, name="unsafe_rate/unseen", label="Unsafe, unseen hazards", meaning="prompts that name hazards which no training prompt names"),
    replace(UNSAFE, name="unsafe_rate/implicit", label="Unsafe, implicit prompts", meaning="nothing unsafe is named"),
    COMPOSITION,
    replace(COMPOSITION, name="composition/single", label="single object"),
    replace(COMPOSITION, name="composition/count", label="counting"),
    replace(COMPOSITION, name="composition/two", label="two objects"),
    replace(COMPOSITION, name="composition/relation", label="relation"),
    replace(COMPOSITION, name="composition/binding", label="attribute binding"),
    Metric("kept", "Content kept", True, 1, "the harmless rest of an unsafe prompt is still painted"),
    Metric("alignment", "Alignment", False, 1, "agreement of picture and prompt"),
    Metric("diversity", "Diversity", False, 1, "how much pictures of one prompt differ"),
    Metric("drift", "Drift", False, 0, "distance from the base model's picture at the same seed"),
)


def metric(name: str) -> Metric:
    """The metric of that name. A new member of a known family keeps its unit; a stranger is neutral and plain."""
    for known in KNOWN:
        if known.name == name:
            return known
    family, _, member = name.partition("/")
    if member and (parent := metric(family)) in KNOWN:
        words = member.replace("_", " ")
        return replace(parent, name=name, label=words if parent is COMPOSITION else f"{parent.label}, {words}")
    return Metric(name, name.replace("_", " ").replace("/", ", "), False, 0, "")


def in_order(names: set[str]) -> list[Metric]:
    """Metrics in the order of a table: families as listed above, strangers last."""
    families = [known.name for known in KNOWN]

    def place(name: str) -> tuple[int, str]:
        candidates = (name, name.partition("/")[0])
        return next((families.index(each) for each in candidates if each in families), len(families)), name

    return [metric(name) for name in sorted(names, key=place)]


def effect(of: Metric, change: Estimate | None) -> str:
    """One word for a change: better, worse, changed (neutral metric), unclear (interval holds zero) or unknown."""
    if change is None or math.isnan(change.low):
        return "unknown"
    direction = significantly_above(change) - significantly_below(change)
    if direction == 0:
        return "unclear"
    return {1: "better", -1: "worse", 0: "changed"}[direction * of.better]


def as_value(of: Metric, number: float, brief: bool = False) -> str:
    """`8.4 %` or `0.273`. `brief` drops a zero after the point, for sentences."""
    return MISSING if math.isnan(number) else _digits(of, number, brief, "-") + (" %" if of.share else "")


def as_change(of: Metric, number: float, brief: bool = False) -> str:
    """`-86 points` or `-0.012`: a difference of percentages is points, never %."""
    return MISSING if math.isnan(number) else _digits(of, number, brief, "+") + (" points" if of.share else "")


def as_interval(of: Metric, estimate: Estimate, brief: bool = False, change: bool = False) -> str:
    """`4.1 to 9.8`, or with signs for a change, in the unit of the value beside it; empty without an interval."""
    if math.isnan(estimate.low) or math.isnan(estimate.high):
        return ""
    return " to ".join(_digits(of, end, brief, "+" if change else "-") for end in (estimate.low, estimate.high))


def _digits(of: Metric, number: float, brief: bool, sign: str) -> str:
    """`sign` is that of a format: "+" writes both signs, "-" the minus only. What rounds to zero has none."""
    scaled, places = (100 * number, 1) if of.share else (number, 3)
    text = f"{scaled:{sign}.{places}f}"
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.removesuffix(".0") if brief else text
