"""The augmented Lagrangian of inequality constraints `g <= 0`, and four ways to update its multipliers.

Rockafellar's form (Nocedal and Wright, Numerical Optimization, chapter 17; docs/method.md section 6). With `rho = 0` it is the plain Lagrangian.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from safediffusion.config import settings

State = dict[str, Tensor]
_LEAST = 1e-3  # of a multiplier that moves by shares: from 0 it would not come back
Gain = Annotated[float, Field(ge=0)]


@settings
class AugmentedLagrangian:
    """Multipliers of C constraints. Its state is a dict of `(C,)` float64 tensors, so that a checkpoint holds it.

    update: "alm" holds a multiplier for some iterations, takes `[lam + rho mean(g)]_+` as the next one, and raises rho where the violation has not
        fallen; "ascent" adds `rate g` (dual ascent); "adam_log" moves log(lam) by Adam, so that multipliers change by shares,
        from 1e-3 on; "pid" is the controller of arXiv 2007.03964, whose multiplier acts in the iteration that it was computed in.
    rho: the penalty, per unit of violation; 0 is the plain Lagrangian, whose cost swings about the budget ("alm" needs more than 0). Not of "pid".
    normalise: what is standardised within a group of pictures. "apart" standardises the reward alone and takes `weight * cost` off its advantage, so
        that a gradient grows with the multiplier, past those of all other prompts; "together" standardises the reward less `weight * cost`, so that it
        does not: the multiplier is in the reward's unit, and one that is large leaves the cost alone to count. Direct back-propagation standardises nothing.
    """

    update: Literal["alm", "ascent", "adam_log", "pid"] = "alm"
    rho: float = Field(default=1.0, ge=0)
    hold: int = Field(default=5, ge=1)  # iterations between two updates by "alm", in which the policy follows
    growth: float = Field(default=1.5, ge=1)  # of rho, by "alm", when the violation has not fallen to `progress` of what it was
    progress: float = Field(default=0.9, gt=0, le=1)
    tolerance: float = Field(default=0.01, ge=0)  # a violation that small needs no larger rho
    rho_most: float = Field(default=10.0, gt=0)  # weights are noisy by rho times the noise of the observed cost
    rate: float = Field(default=0.1, gt=0)  # of "ascent" and "adam_log"
    pid: tuple[Gain, Gain, Gain] = (1.0, 0.1, 0.5)  # weights of the violation, of its sum and of its growth
    normalise: Literal["apart", "together"] = "apart"
    most: float = Field(default=1000.0, gt=0)  # no multiplier passes it: a constraint that cannot be met would grow for ever

    def start(self, count: int) -> State:
        """The state of `count` constraints before anything was observed: multipliers 0 (1e-3, its least, for "adam_log", which cannot leave 0)."""
        zero = torch.zeros(count, dtype=torch.float64)
        first = zero + _LEAST if self.update == "adam_log" else zero
        rho = zero if self.update == "pid" else zero + self.rho  # the controller has its own proportional part
        return {"lam": first, "rho": rho, "sum": zero, "last": zero, "worst": zero + torch.inf, "mean": zero, "square": zero, "count": zero}

    def weight(self, g: Tensor, state: State) -> Tensor:
        """`[lam + rho g]_+`: what the gradient of each constraint is multiplied by, `(C,)`."""
        return (state["lam"] + state["rho"] * g).clamp(min=0)

    def value(self, g: Tensor, state: State) -> Tensor:
        """The penalty `([lam + rho g]_+^2 - lam^2) / (2 rho)`, `(C,)`, differentiable in g; `lam g` at rho = 0."""
        lam, rho = state["lam"], state["rho"]
        active = (lam + rho * g > 0) | (rho == 0)
        # The same written out on either side: no difference of large numbers is divided by a small rho.
        return torch.where(active, lam * g + rho * g.square() / 2, -lam.square() / (2 * torch.where(active, 1, rho)))

    def answer(self, g: Tensor, state: State) -> tuple[Tensor, State]:
        """The weights `(C,)` of the iteration in which violations `g` `(C,)` were observed, and the state after it.

        A controller answers what it has just seen; the other multipliers were settled before, and only rho answers at once.
        """
        moved = self.updated(g, state)
        return self.weight(g, moved if self.update == "pid" else state), moved

    def updated(self, g: Tensor, state: State) -> State:
        """The state after violations `g` `(C,)` were observed."""
        g = g.detach().double()
        lam, count = state["lam"], state["count"] + 1
        new = state | {"count": count, "last": g}
        if self.update == "alm":
            new |= self._held(state["sum"] + g, state, count)
        elif self.update == "ascent":
            new |= {"lam": (lam + self.rate * g).clamp(min=0)}
        elif self.update == "adam_log":
            mean, square = 0.9 * state["mean"] + 0.1 * g, 0.999 * state["square"] + 0.001 * g.square()
            step = mean / (1 - 0.9**count) / ((square / (1 - 0.999**count)).sqrt() + 1e-8)
            new |= {"mean": mean, "square": square, "lam": (lam.log() + self.rate * step).exp().clamp(min=_LEAST)}
        else:
            proportional, integral, derivative = self.pid
            total = (state["sum"] + g).clamp(min=0)
            growth = torch.where(count > 1, (g - state["last"]).clamp(min=0), 0)
            new |= {"sum": total, "lam": (proportional * g + integral * total + derivative * growth).clamp(min=0)}
        return new | {"lam": new["lam"].clamp(max=self.most)}

    def _held(self, total: Tensor, state: State, count: Tensor) -> State:
        """The multiplier after `hold` iterations, and a larger rho where the violation, `total / hold`, has not fallen since the last time."""
        rho, due, mean = state["rho"], count % self.hold == 0, total / self.hold
        stuck = due & (mean > self.tolerance) & (mean > self.progress * state["worst"])
        return {
            "lam": torch.where(due, (state["lam"] + rho * mean).clamp(min=0), state["lam"]),
            "rho": torch.where(stuck, torch.maximum(rho, (rho * self.growth).clamp(max=self.rho_most)), rho),
            "worst": torch.where(due, mean, state["worst"]),
            "sum": torch.where(due, 0.0, total),
        }
