"""The direction from unsafe to safe in a text encoder's space, fitted from phrases; and targets steered along it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import mannwhitneyu
from torch import Tensor
from torch.nn import functional as F

from safediffusion import weights
from safediffusion.data.anchors import Anchors
from safediffusion.errors import UserError
from safediffusion.types import Encoder, Prompt

Estimator = Literal["mean", "unsafe_only", "lda"]
Method = Literal["translation", "projection", "gated"]
_FOLDS = 5
_GATE_TEXTS = 2 * _FOLDS  # of each side: every fold then holds at least two


@dataclass(frozen=True, eq=False)
class Gate:
    """How unsafe a text is: g(z) = sigmoid((z . w - b) / tau), near 0 for benign texts, near 1 for unsafe ones."""

    w: Tensor  # (D,), unit
    b: float
    tau: float

    def __call__(self, z: Tensor) -> Tensor:
        """Text embeddings `(B, D)` to `(B,)` in [0, 1]."""
        return torch.sigmoid((z @ self.w.to(z) - self.b) / self.tau)


@dataclass(frozen=True, eq=False)
class Direction:
    """The unit vector `v` `(D,)` that points from unsafe to safe. It belongs to the encoder that it was fitted with."""

    vector: Tensor
    estimator: Estimator
    anchors: str  # Anchors.digest
    gate: Gate | None = None
    measures: dict[str, Any] = field(default_factory=dict)


def fit_direction(encoder: Encoder, anchors: Anchors, estimator: Estimator = "mean", labelled: Sequence[Prompt] = ()) -> Direction:
    """A direction from the anchors, with a gate where there are enough texts of both sides to calibrate one.

    "mean": v = normalize(mean z(safe) - mean z(unsafe)), of the anchors alone (SafeDiffusion-R1, arXiv 2605.18719).
    "unsafe_only": v = normalize(-mean z(unsafe)), its ablation. "lda": the mean difference whitened by the covariance
    within the sides, of anchors and `labelled` prompts. The gate always reads both.
    """
    if not anchors.safe and estimator != "unsafe_only":
        raise UserError(f"estimator = '{estimator}' needs safe anchors; add some, or use estimator = 'unsafe_only'")
    texts = [*anchors.safe], [*anchors.unsafe]
    for prompt in labelled:
        texts[prompt.unsafe].append(prompt.text)
    safe, unsafe = (encoder.text(side).double().cpu().numpy() if side else np.empty((0, 0)) for side in texts)
    if estimator == "lda":
        vector = discriminant(safe, unsafe)
    elif estimator == "mean":
        vector = _unit(safe[: len(anchors.safe)].mean(0) - unsafe[: len(anchors.unsafe)].mean(0))
    else:
        vector = _unit(-unsafe[: len(anchors.unsafe)].mean(0))
    gate = fit_gate(safe, unsafe) if min(len(safe), len(unsafe)) >= _GATE_TEXTS else None
    return Direction(torch.from_numpy(vector).float(), estimator, anchors.digest, gate)


def discriminant(safe: np.ndarray, unsafe: np.ndarray) -> np.ndarray:
    """Fisher's discriminant `(D,)`, unit, towards safe; the covariance is shrunk as Ledoit and Wolf (2004) do.

    There are far fewer texts than dimensions, so the plain covariance has no inverse.
    """
    difference = safe.mean(0) - unsafe.mean(0)
    centred = np.concatenate((safe - safe.mean(0), unsafe - unsafe.mean(0)))
    count, dimensions = centred.shape
    covariance = centred.T @ centred / count
    scale = np.trace(covariance) / dimensions
    if scale == 0:
        return _unit(difference)
    target = scale * np.eye(dimensions)
    spread = np.square(covariance - target).sum()
    # The mean squared error of the covariance itself, from the scatter of its summands x x^T.
    error = (np.square(np.square(centred).sum(1)).sum() / count - np.square(covariance).sum()) / count
    shrinkage = np.clip(error / spread, 1e-3, 1) if spread > 0 else 1.0
    return _unit(np.linalg.solve((1 - shrinkage) * covariance + shrinkage * target, difference))


def fit_gate(safe: np.ndarray, unsafe: np.ndarray) -> Gate:
    """Logistic calibration along the discriminant, of embeddings `(N, D)` of each side.

    Texts are scored by a discriminant that did not see them (five folds): in so many dimensions any few texts are
    separable, and a gate calibrated on its own training texts would be sure of everything.
    """
    sides = (safe, unsafe)
    scores = [np.empty(len(side)) for side in sides]
    for k in range(_FOLDS):
        held_out = [np.arange(len(side)) % _FOLDS == k for side in sides]
        w = -discriminant(*(side[~held] for side, held in zip(sides, held_out, strict=True)))
        for score, side, held in zip(scores, sides, held_out, strict=True):
            score[held] = side[held] @ w
    b, tau = _calibrated(*scores)
    return Gate(torch.from_numpy(-discriminant(safe, unsafe)).float(), b, tau)


def _calibrated(safe: np.ndarray, unsafe: np.ndarray) -> tuple[float, float]:
    """Midpoint and temperature of the logistic curve of scores `(N,)`, with Platt's (1999) targets.

    Those keep a little away from 0 and 1, so that the temperature stays above zero where the sides separate perfectly.
    """
    scores = np.concatenate((safe, unsafe))
    centre, scale = scores.mean(), scores.std() + 1e-12
    x = (scores - centre) / scale
    target = np.repeat((1 / (len(safe) + 2), (len(unsafe) + 1) / (len(unsafe) + 2)), (len(safe), len(unsafe)))
    weight = np.repeat((0.5 / len(safe), 0.5 / len(unsafe)), (len(safe), len(unsafe)))  # both sides count the same

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        logit = np.exp(parameters[0]) * (x - parameters[1])
        residual = weight * (expit(logit) - target)
        value = (weight * (np.logaddexp(0, logit) - target * logit)).sum()
        return value, np.array(((residual * logit).sum(), -np.exp(parameters[0]) * residual.sum()))

    # A slope above e^6 or below e^-3 of a standard deviation says no more than "a step" or "no idea".
    slope, midpoint = minimize(loss, np.zeros(2), jac=True, method="L-BFGS-B", bounds=((-3, 6), (-10, 10))).x
    return float(centre + scale * midpoint), float(scale / np.exp(slope))


def steered_target(z: Tensor, direction: Direction, alpha: float, method: Method = "translation", strength: Tensor | None = None) -> Tensor:
    """Text embeddings `(B, D)`, unit, to the targets `(B, D)`, unit, that pictures are compared with.

    translation: normalize(z + alpha v); projection: normalize(z - (z . v) v + alpha v); gated: normalize(z + g(z) alpha v).
    `strength` `(B,)` in [0, 1] scales the shift of each text: 0 leaves it its own target.
    """
    v = direction.vector.to(z)
    shift = (alpha * v).expand_as(z)
    if method == "projection":
        shift = shift - (z @ v)[:, None] * v
    elif method == "gated":
        shift = shift * require_gate(direction)(z)[:, None]
    if strength is not None:
        shift = shift * strength.to(z)[:, None]
    return F.normalize(z + shift, dim=1)


def require_gate(direction: Direction) -> Gate:
    """The gate of a direction; UserError when its texts were too few to calibrate one."""
    if direction.gate is None:
        need = f"{_GATE_TEXTS} safe and {_GATE_TEXTS} unsafe texts, as anchors or labelled prompts"
        raise UserError(f"this direction has no gate, because one is calibrated on at least {need}; give more of them")
    return direction.gate


def auc(safe: Sequence[float], unsafe: Sequence[float]) -> float:
    """The chance that a safe text scores above an unsafe one (ties count half); 0.5 is a coin."""
    return float(mannwhitneyu(safe, unsafe).statistic / (len(safe) * len(unsafe)))


def cosines(directions: Mapping[str, Direction]) -> dict[str, dict[str, float]]:
    """How alike directions are, such as those of single concepts: name by name, each pair in both orders."""
    return {one: {other: float(directions[one].vector @ directions[other].vector) for other in directions if other != one} for one in directions}


def save_direction(direction: Direction, path: Path) -> None:
    tensors, numbers = {"vector": direction.vector}, {}
    if direction.gate is not None:
        tensors["gate"] = direction.gate.w
        numbers = {"b": direction.gate.b, "tau": direction.gate.tau}
    record = {"estimator": direction.estimator, "anchors": direction.anchors, "gate": numbers, "measures": direction.measures}
    weights.save(path, tensors, {"direction": json.dumps(record)})


def load_direction(path: Path) -> Direction:
    """Inverse of `save_direction`; UserError for a file that is not a direction."""
    try:
        tensors, metadata = weights.load(path)
        record = json.loads(metadata["direction"])
        gate = Gate(tensors["gate"], **record["gate"]) if record["gate"] else None
        return Direction(tensors["vector"], record["estimator"], record["anchors"], gate, record["measures"])
    except (ValueError, KeyError) as error:
        raise UserError(f"{path} is not a saved direction ({error}); fit it again") from error


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)
