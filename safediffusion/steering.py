"""A direction studied on its own, before any training: fitted, measured on prompts and on pictures, judged, written."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from safediffusion import build
from safediffusion.data.anchors import Anchors, load_anchors
from safediffusion.encoders.clip import ClipEncoder
from safediffusion.errors import UserError
from safediffusion.evaluate.pictograms import VALIDATION_SETS
from safediffusion.files import write_json, write_text
from safediffusion.report.figures import direction_figures, standalone
from safediffusion.rewards.calibrate import Pairs, accuracy_rows, calibrate_alpha, measure_direction
from safediffusion.rewards.direction import Direction, Estimator, Method, fit_direction, require_gate, save_direction
from safediffusion.tiny.scenes import SEEN_HAZARDS, Item
from safediffusion.types import Prompt


@dataclass(frozen=True)
class Study:
    """What is asked. `safe` and `unsafe` are sets or files to measure on; the embedded encoder has its own."""

    encoder: str
    anchors: str
    estimator: Estimator
    method: Method
    alpha: float | Literal["auto"]
    safe: str | None = None
    unsafe: str | None = None
    compare: tuple[str, ...] = ()


@dataclass(frozen=True)
class Studied:
    """What was found. `refusal` says why training would not accept the direction; "" when it would."""

    direction: Direction
    measures: dict[str, Any]
    refusal: str


def study(asked: Study, pairs: Pairs | None, device: torch.device) -> Studied:
    """Fit and measure. Prompts that the fit has seen are never those that it is measured on."""
    judge, anchors = build.encoder(asked.encoder, device), load_anchors(asked.anchors)
    labelled, measured_on = _prompts(asked)
    direction = fit_direction(judge, anchors, asked.estimator, labelled)
    if asked.method == "gated":
        require_gate(direction)
    rows = accuracy_rows(judge, direction, pairs, asked.method) if pairs else []
    refusals = []
    alpha: float | None = None
    if asked.alpha != "auto":
        alpha = asked.alpha
    elif rows:
        try:
            alpha = calibrate_alpha(rows)
        except UserError as error:
            refusals.append(str(error))
            alpha = calibrate_alpha(rows, trust=True)
    if measured_on:
        concepts = _concepts(asked, judge, direction, anchors)
        measures = measure_direction(judge, direction, measured_on, name=asked.anchors, alpha=alpha or 0.0, rows=rows, concepts=concepts)
        if measures["auc"] < build.LEAST_AUC:
            refusals.insert(0, f"AUC {measures['auc']:.2f} on held-out prompts, {build.LEAST_AUC} needed")
    else:
        measures = {"name": asked.anchors, "estimator": asked.estimator, "auc": None, "projections": {}, "pair_accuracy": rows, "cosines": {}}
    measures |= {"alpha": alpha, "method": asked.method, "encoder": judge.identity}
    return Studied(dataclasses.replace(direction, measures=measures), measures, "; ".join(refusals))


def write_study(found: Studied, out: Path) -> None:
    """direction.safetensors, direction.json and a figure per measure."""
    for number, figure in enumerate(direction_figures(found.measures, "direction"), 1):
        write_text(out / f"figure-{number}.svg", standalone(figure))
    save_direction(found.direction, out / "direction.safetensors")
    write_json(out / "direction.json", found.measures)


def _prompts(asked: Study) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
    """Labelled prompts for the fit, and others to measure on. Of a user's own every other one is for either."""
    if asked.safe and asked.unsafe:
        safe, unsafe = build.prompts(asked.safe, False), build.prompts(asked.unsafe, True)
        if asked.estimator != "lda" and asked.method != "gated":
            return (), (*safe, *unsafe)
        return (*safe[::2], *unsafe[::2]), (*safe[1::2], *unsafe[1::2])
    if asked.encoder != build.PICTOGRAMS:
        return (), ()
    labelled = build.prompts("pictograms/train-safe", False) + build.prompts("pictograms/train-unsafe", True)
    return labelled, tuple(prompt for name in VALIDATION_SETS.values() for prompt in build.prompts(name, name != VALIDATION_SETS["safe"]))


def _concepts(asked: Study, judge: ClipEncoder, direction: Direction, anchors: Anchors) -> dict[str, Direction]:
    """Directions to compare with: other anchor sets, and in the embedded world one of each hazard that the anchors name."""
    concepts = {asked.anchors: direction} | {name: fit_direction(judge, load_anchors(name), asked.estimator) for name in asked.compare}
    if asked.anchors == build.PICTOGRAMS:
        for hazard in SEEN_HAZARDS:
            if named := tuple(text for text in anchors.unsafe if Item(hazard).noun() in text):
                concepts[hazard] = fit_direction(judge, Anchors(safe=anchors.safe, unsafe=named), asked.estimator)
    return concepts
