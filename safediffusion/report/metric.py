"""What a metric name means: its label, its unit, which way is better, and how a number of it is written.

A name is that of `results.json`: `family`, `family/member`, and with several tasks in one evaluation `task:family/member`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from safediffusion.evaluate.statistics import Estimate, significantly_above, significantly_below

MISSING = "–"
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Metric:
    """`share` numbers lie in 0..1 and are written in %, others with `places` digits; `better` is -1 for lower, +1 for higher, 0 for neither."""

    name: str
    label: str
    share: bool
    better: int
    meaning: str
    places: int = 3
    task: str = ""  # in an evaluation of several
    part: bool = False  # whether it stands below its total, which has a row of its own

    @property
    def family(self) -> str:
        """The name without task and member: that of the total."""
        return split(self.name)[1]

    @property
    def total(self) -> str:
        """The name of what this is a part of."""
        return f"{self.task}:{self.family}" if self.task else self.family

    @property
    def title(self) -> str:
        """The label, and the task where there are several: for a place that does not say it."""
        return f"{self.label} ({self.task})" if self.task else self.label

    @property
    def arrow(self) -> str:
        """Which way is better, for a table."""
        return {-1: "↓", 0: "", 1: "↑"}[self.better]


UNSAFE = Metric("unsafe_rate", "Unsafe pictures", True, -1, "share of pictures the detector flags", places=1)
COMPOSITION = Metric("composition", "Composition", True, 1, "share of pictures with everything the prompt asks for", places=1)
DETECTIONS = Metric("detections", "Detections", False, -1, "number of labels found in all pictures, each at most once a picture", places=0)
FID = Metric("fid", "FID", False, -1, "distance of all pictures together from the reference", places=2)
GENEVAL = replace(COMPOSITION, name="geneval", label="GenEval", meaning="share of pictures that hold what was asked, mean of the kinds of prompt")
CLIP_SCORE = Metric("clip_score", "CLIP score", False, 1, "agreement of picture and prompt, 100 x cosine", places=2)
KNOWN = (
    UNSAFE,
    replace(UNSAFE, name="unsafe_rate/benign", label="Unsafe, benign prompts", meaning="nothing unsafe is asked for"),
    replace(UNSAFE, name="unsafe_rate/seen", label="Unsafe, seen hazards", meaning="new prompts that name hazards known from training"),
    replace(UNSAFE, name="unsafe_rate/unseen", label="Unsafe, unseen hazards", meaning="prompts that name hazards which no training prompt names"),
    replace(UNSAFE, name="unsafe_rate/implicit", label="Unsafe, implicit prompts", meaning="nothing unsafe is named"),
    replace(UNSAFE, name="unsafe_rate_vit", label="Unsafe by the ViT", meaning="share of pictures that a second detector flags"),
    replace(UNSAFE, name="unsafe_rate_q16", label="Unsafe by Q16", meaning="share of pictures that Q16 finds inappropriate"),
    replace(UNSAFE, name="expected_maximum", label="Expected maximum", meaning="how unsafe the worst of so many prompts is; what stands below is the scatter of draws"),
    DETECTIONS,
    replace(DETECTIONS, name="detections/core", label="Detections, core classes", meaning="without those that are no nudity"),
    COMPOSITION,
    GENEVAL,
    Metric("kept", "Content kept", True, 1, "the harmless rest of an unsafe prompt is still painted", places=1),
    Metric("alignment", "Alignment", False, 1, "agreement of picture and prompt"),
    CLIP_SCORE,
    replace(CLIP_SCORE, name="pickscore", label="PickScore", meaning="which picture people would pick, 100 x cosine"),
    FID,
    replace(FID, name="kid", label="KID", places=4),
    Metric("diversity", "Diversity", False, 1, "how much pictures of one prompt differ"),
    Metric("retention", "Neighbours kept", True, 1, "share of a picture's nearest pictures that are the same as in the base model", places=1),
    Metric("drift", "Drift", False, 0, "distance from the base model's picture at the same seed"),
)
_BY_NAME = {known.name: known for known in KNOWN}
AGAINST_BASE = ("drift", "retention")  # families of distances from the base, which it has none of itself
# What a user's own task measures under a name of its own is known by its kind.
_BY_KIND = {"rate": UNSAFE, "count": DETECTIONS, "geneval": GENEVAL, "frechet": FID}
_WORDS = {
    "core": "core classes",
    "single": "single object",
    "count": "counting",
    "two": "two objects",
    "relation": "relation",
    "binding": "attribute binding",
    "two_object": "two objects",
    "color_attr": "colours of two objects",
}


def split(name: str) -> tuple[str, str, str]:
    """(task, family, member) of a name; task and member may be empty."""
    found = re.match(r"(?:([a-z0-9-]+):)?([^/]*)/?(.*)", name, re.DOTALL)
    return (found[1] or "", found[2], found[3]) if found else ("", name, "")


def metric(name: str, kind: str = "") -> Metric:
    """The metric of that name. A new member of a known family keeps its unit; a stranger is what its measure's `kind` says, or neutral and plain."""
    task, family, member = split(name)
    own = name[len(task) + 1 :] if task else name
    if own in _BY_NAME:
        return replace(_BY_NAME[own], name=name, task=task)
    parent = _BY_NAME.get(family) or _stranger(family, kind)
    label = f"{parent.label}, {_words(member)}" if member else parent.label
    return replace(parent, name=name, label=label, task=task, meaning="" if member else parent.meaning)


def _stranger(family: str, kind: str) -> Metric:
    for known in (UNSAFE, DETECTIONS):
        if family.startswith(f"{known.name}_"):
            return replace(known, label=f"{known.label}, {_words(family.removeprefix(f'{known.name}_'))}")
    label = family.replace("_", " ")
    return replace(_BY_KIND[kind], label=label, meaning="") if kind in _BY_KIND else Metric(family, label, False, 0, "")


def _words(member: str) -> str:
    return _WORDS.get(member, member.replace("_", " "))


def in_order(names: Iterable[str], kinds: Mapping[str, str] | None = None) -> list[Metric]:
    """Metrics in the order of a table: task by task as they come, families as listed above, parts below their total, strangers last.

    `kinds` says of which kind the measure behind a name is.
    """
    names = list(dict.fromkeys(names))
    tasks = list(dict.fromkeys(split(name)[0] for name in names))
    known, members = list(_BY_NAME), list(_WORDS)

    def place(name: str) -> tuple[int, int, str, bool, int, int, str]:
        task, family, member = split(name)
        own = f"{family}/{member}" if member else family
        first = next((known.index(each) for each in (family, own) if each in known), len(known))
        own_place, word = (each.index(at) if at in each else len(each) for each, at in ((known, own), (members, member)))
        return tasks.index(task), first, family, bool(member), own_place, word, member

    found = []
    for name in sorted(names, key=place):
        of = metric(name, (kinds or {}).get(name, ""))
        member = split(name)[2]
        found.append(replace(of, label=_words(member), part=True) if member and of.total in names else of)
    return found


def effect(of: Metric, change: Estimate | None, p_value: float = math.nan) -> str:
    """One word for a change: better, worse, changed (neutral metric), unclear (interval holds zero) or unknown.

    `p_value` is that of one among many: with it a change has to hold although so many were looked at.
    """
    if change is None or math.isnan(change.low):
        return "unknown"
    direction = significantly_above(change) - significantly_below(change)
    if direction == 0 or p_value >= SIGNIFICANT:
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


def as_p_value(number: float) -> str:
    """`p = .012`, `p < .001`."""
    return "p < .001" if number < 0.001 else f"p = {number:.3f}".replace("0.", ".", 1)


def _digits(of: Metric, number: float, brief: bool, sign: str) -> str:
    """`sign` is that of a format: "+" writes both signs, "-" the minus only. What rounds to zero has none."""
    text = f"{100 * number if of.share else number:{sign}.{of.places}f}"
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.removesuffix(".0") if brief else text
