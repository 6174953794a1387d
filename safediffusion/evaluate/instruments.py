"""Detectors and encoders as instruments: what each of them says of a picture, as columns."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from safediffusion.detectors.coco import CocoObjects
from safediffusion.detectors.objects import ObjectDetector
from safediffusion.errors import UserError
from safediffusion.evaluate import pictograms
from safediffusion.evaluate.geneval import check_known, judge
from safediffusion.evaluate.rows import Row
from safediffusion.evaluate.scoring import Columns, Form
from safediffusion.tiny.scenes import SIZE, parse
from safediffusion.types import Detector, Encoder


def _nothing(rows: Sequence[Row]) -> None:
    """Any prompt will do."""


@dataclass(frozen=True)
class Asked:
    """An instrument made of a function: `say` of images and their rows gives the columns, `check` raises UserError for rows that it cannot be asked about.

    `columns` are their names, each with what it holds for a picture: a mistake in a task is found before anything is painted.
    """

    identity: Mapping[str, Any]
    say: Callable[[Tensor, Sequence[Row]], Columns]
    columns: Mapping[str, Form]
    reads_prompt: bool = False
    check: Callable[[Sequence[Row]], None] = _nothing

    def __call__(self, images: Tensor, rows: Sequence[Row]) -> Columns:
        return self.say(images, rows)


def labels(detector: Detector, identity: Mapping[str, Any]) -> Asked:
    """A column for each label of a detector."""

    def say(images: Tensor, rows: Sequence[Row]) -> Columns:
        return dict(zip(detector.labels, detector(images).float().cpu().numpy().T, strict=True))

    return Asked(identity, say, dict.fromkeys(detector.labels, "number"))


def likenesses(encoder: Encoder, identity: Mapping[str, Any]) -> Asked:
    """Of an image-text encoder `embedding` of the picture, and `alignment`, its cosine to the prompt."""

    def say(images: Tensor, rows: Sequence[Row]) -> Columns:
        image, text = encoder.image(images), encoder.text([row.prompt.text for row in rows])
        return {"embedding": image.cpu().numpy(), "alignment": (image * text).sum(1).cpu().numpy()}

    return Asked(identity, say, {"embedding": "vector", "alignment": "number"}, reads_prompt=True)


def features(network: Callable[[Tensor], Tensor], identity: Mapping[str, Any]) -> Asked:
    """`embedding`, of a network of which only the features are wanted."""
    return Asked(identity, lambda images, rows: {"embedding": network(images).cpu().numpy()}, {"embedding": "vector"})


def pictogram_objects(detector: ObjectDetector, identity: Mapping[str, Any]) -> Asked:
    """`found`: the objects that the embedded world's detector reads, as a text."""

    def say(images: Tensor, rows: Sequence[Row]) -> Columns:
        if images.shape[-2:] != (SIZE, SIZE):
            raise UserError(f"the pictograms detector reads pictures of {SIZE} pixels; these have {images.shape[-1]} x {images.shape[-2]}")
        return {"found": [pictograms.told(found) for found in detector.read(images.to(next(detector.parameters())))]}

    def check(rows: Sequence[Row]) -> None:
        for row in rows:
            try:
                parse(row.prompt.text)
            except ValueError:
                raise UserError(
                    f'{row.prompt.text[:60]!r} is no caption of the embedded world, and a measure of kind "pictograms" reads nothing else; take another kind'
                ) from None

    return Asked(identity, say, {"found": "text"}, check=check)


def geneval(detector: CocoObjects, identity: Mapping[str, Any]) -> Asked:
    """GenEval's question to a detector of COCO's objects: `correct`, the `reason` where it is not, and what was `seen`, both as texts."""

    def say(images: Tensor, rows: Sequence[Row]) -> Columns:
        every = detector(images, [row.case.coloured for row in rows])
        verdicts = [judge(row.case, seen) for row, seen in zip(rows, every, strict=True)]
        told = [json.dumps([[one.name, round(one.score, 4), list(one.box), one.colour] for one in seen]) for seen in every]
        return {"correct": np.array([verdict.correct for verdict in verdicts], float), "reason": [verdict.reason for verdict in verdicts], "seen": told}

    def check(rows: Sequence[Row]) -> None:
        if other := next((row for row in rows if row.case is None), None):
            raise UserError(
                f"{other.prompt.text[:60]!r} does not say which objects it asks for, as GenEval's prompts do; "
                'give the task prompts of kind "geneval", or leave out what asks the detector of their objects'
            )
        check_known([row.case for row in rows], detector.labels, detector.colours)

    return Asked(identity, say, {"correct": "number", "reason": "text", "seen": "text"}, reads_prompt=True, check=check)
