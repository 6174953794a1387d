"""Is a direction worth following, and how far? Measured on held-out prompts and on pairs of pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from safediffusion.errors import UserError
from safediffusion.rewards.direction import Direction, Method, auc, cosines, steered_target
from safediffusion.types import Encoder, Prompt

ALPHAS = tuple(0.25 * step for step in range(1, 13))
# What a reward must get right before it may train: the picture without the hazard first, but not at any price.
MINIMUM_SAFE, MINIMUM_KEPT = 0.95, 0.90
_BATCH = 64


@dataclass(frozen=True, eq=False)
class Pairs:
    """N unsafe prompts with three pictures each, `(N, 3, H, W)`, and whether the prompt has harmless content, `(N,)`."""

    prompts: tuple[Prompt, ...]
    safe: Tensor  # the harmless content without the hazard
    unsafe: Tensor  # the same with the hazard
    unrelated: Tensor  # a harmless picture of something else
    has_content: Tensor  # bool: False where the prompt asks for nothing but the hazard


@dataclass(frozen=True, eq=False)
class _Seen:
    """Pairs as the encoder sees them: unit vectors `(N, D)`."""

    text: Tensor
    safe: Tensor
    unsafe: Tensor
    unrelated: Tensor
    has_content: Tensor


@torch.no_grad()
def _see(encoder: Encoder, pairs: Pairs) -> _Seen:
    pictures = (pairs.safe, pairs.unsafe, pairs.unrelated)
    seen = [torch.cat([encoder.image(batch) for batch in images.split(_BATCH)]) for images in pictures]
    text = encoder.text([prompt.text for prompt in pairs.prompts])
    return _Seen(text, *seen, pairs.has_content.to(text.device))


def pair_accuracy(encoder: Encoder, direction: Direction, pairs: Pairs, alpha: float, method: Method = "translation") -> tuple[float, float]:
    """Shares of prompts, by their steered target: safe picture above the unsafe one, and above the unrelated one.

    The second is of the prompts that have harmless content; NaN where none has.
    """
    return _accuracy(_see(encoder, pairs), direction, alpha, method)


def _accuracy(seen: _Seen, direction: Direction, alpha: float, method: Method) -> tuple[float, float]:
    target = steered_target(seen.text, direction, alpha, method)
    safe, unsafe, unrelated = ((image * target).sum(1) for image in (seen.safe, seen.unsafe, seen.unrelated))
    return _share(safe > unsafe), _share((safe > unrelated)[seen.has_content])


def _share(right: Tensor) -> float:
    # In float64, so that 95 of 100 is not less than 0.95; the mean of nothing is NaN.
    return float(right.cpu().double().mean())


def accuracy_rows(encoder: Encoder, direction: Direction, pairs: Pairs, method: Method = "translation", alphas: Sequence[float] = ALPHAS) -> list[dict[str, Any]]:
    """`pair_accuracy` at each alpha, as the rows of direction.json."""
    seen, rows = _see(encoder, pairs), []
    for alpha in alphas:
        safe_preferred, content_kept = _accuracy(seen, direction, alpha, method)
        shares = {"safe_preferred": safe_preferred, "content_kept": content_kept}
        rows.append({"alpha": alpha, "method": method, **shares, "n": len(pairs.prompts)})
    return rows


def calibrate_alpha(rows: Sequence[dict[str, Any]], trust: bool = False) -> float:
    """The smallest alpha that gets enough pairs right; UserError when none does.

    With `trust` it is then the least bad one instead.
    """
    good = [row["alpha"] for row in rows if _margin(row) >= 1]
    if good:
        return min(good)
    best = max(rows, key=_margin)
    if trust:
        return best["alpha"]
    raise UserError(
        f"the direction does not measure up: at its best alpha, {best['alpha']:g}, the reward prefers the safe picture in "
        f"{best['safe_preferred']:.0%} of {best['n']} pairs ({MINIMUM_SAFE:.0%} needed) and keeps the content in "
        f"{best['content_kept']:.0%} ({MINIMUM_KEPT:.0%} needed); choose other anchors or another estimator, "
        "or pass reward.trust_direction=true"
    )


def _margin(row: dict[str, Any]) -> float:
    """At least 1 where both shares suffice; below 0 where one is missing, for NaN compares with nothing."""
    shares = (row["safe_preferred"] / MINIMUM_SAFE, row["content_kept"] / MINIMUM_KEPT)
    return -1.0 if any(map(math.isnan, shares)) else min(shares)


def measure_direction(
    encoder: Encoder,
    direction: Direction,
    prompts: Sequence[Prompt],
    *,
    name: str,
    alpha: float,
    rows: Sequence[dict[str, Any]] = (),
    concepts: Mapping[str, Direction] | None = None,
) -> dict[str, Any]:
    """What direction.json holds. `prompts`, of both kinds, must not be those that the direction was fitted with."""
    projections = {
        kind: _project(encoder, direction, [prompt.text for prompt in prompts if prompt.unsafe == unsafe]) for kind, unsafe in (("safe", False), ("unsafe", True))
    }
    return {
        "name": name,
        "estimator": direction.estimator,
        "auc": auc(**projections),
        "auc_prompts_n": len(prompts),
        "alpha": alpha,
        "projections": projections,
        "pair_accuracy": list(rows),
        "cosines": cosines(concepts or {}),
    }


def _project(encoder: Encoder, direction: Direction, texts: Sequence[str]) -> list[float]:
    if not texts:
        raise UserError("measuring a direction needs both safe and unsafe prompts; one of the two is missing")
    z = encoder.text(texts)
    return (z @ direction.vector.to(z)).tolist()
