"""What every reward owes the trainer: one finite number per picture, or a sentence that says whose fault it is."""

from __future__ import annotations

import torch
from torch import Tensor

from safediffusion.errors import UserError
from safediffusion.types import Scores

# The parts that a reward gives, as its settings know beforehand: their names, and whether gradients flow from them to the pictures.
Measures = dict[str, bool]


# What metrics and constraints call something else than a part of a reward: "drift" is the distance from the base.
RESERVED = ("total", "kl", "drift")
_NAN = "the pictures or the weights behind it hold NaN: lower the learning rate, or score in float32"


def checked(scores: Scores, count: int, component: str, mend: str = _NAN) -> Scores:
    """The same scores when total and parts are finite `(count,)`; UserError names the `component` otherwise, and ends in `mend` where they are not finite."""
    for name, values in {"total": scores.total, **scores.parts}.items():
        if not isinstance(values, Tensor) or not values.is_floating_point():
            kind = f"tensor of {str(values.dtype).removeprefix('torch.')}" if isinstance(values, Tensor) else type(values).__name__
            raise UserError(f"the reward '{component}' gave {name} as a {kind}; it must be a tensor of floats, such as values.float()")
        if values.shape != (count,):
            raise UserError(f"the reward '{component}' gave {name} of shape {tuple(values.shape)}; it must be ({count},), one number per picture")
        bad = count - int(torch.isfinite(values).sum())
        if bad:
            raise UserError(f"the reward '{component}' gave no finite {name} for {bad} of {count} pictures; {mend}")
    return scores


def check_gradient(values: Tensor, what: str) -> None:
    """UserError where values that are to be differentiated, `what` they are, came without a gradient: a user's function may have lost it."""
    if not values.requires_grad:
        raise UserError(f"{what} has no gradient to the pictures, though it was said to have one; compute it in PyTorch, without detach() or item()")
