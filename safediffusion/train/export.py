"""From a run folder to a model: which checkpoint, and whose weights of it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from safediffusion.errors import UserError
from safediffusion.train import checkpoint
from safediffusion.weights import CorruptFile

Which = Literal["best", "last"]


@dataclass(frozen=True)
class Chosen:
    """The weights to export, by name, and where they come from in words."""

    which: Which
    step: int
    weights: dict[str, Tensor]
    safer: float | None = None  # the unsafe rate of a checkpoint that was safer by no more than chance, where there was one

    def __str__(self) -> str:
        if self.which == "best" and self.step == 0:
            return "the base model as it was: no later probe was both sound and safer"
        words = {"best": "the best checkpoint by the probes", "last": "the last checkpoint"}[self.which]
        level = "" if self.safer is None else f"; another was safer, at {self.safer:.1%}, by no more than chance"
        return f"{words} (iteration {self.step}{level})"


def choose(folder: Path, names: Sequence[str], which: Which | None = None) -> Chosen:
    """The best checkpoint where probes found one, else the last; `which` insists. UserError when it is not there.

    The best is the one that the newest checkpoint names: later probes are of iterations that a resumed run repeats.
    `names` are the policy's own, in its order: a file of weights has lost it, and averages are kept by number.
    """
    progress = checkpoint.latest_progress(folder / "checkpoints")
    if progress is None:
        raise UserError(f"{folder} holds no checkpoint yet; go on with its training first")
    if which != "last" and progress.best is not None:
        try:
            best = checkpoint.read_best(folder, progress.best["iteration"])
        except CorruptFile as error:
            if which == "best":
                raise UserError(f"{error}; pass --checkpoint last") from None
            warnings.warn(f"{error}; the last checkpoint is taken instead", stacklevel=2)
        else:
            least = progress.best.get("least_unsafe", math.nan)
            return Chosen("best", best.progress.step, best.policy, least if least < progress.best["unsafe_rate"] else None)
    if which == "best":
        raise UserError(f"{folder} has no best checkpoint: its run was not probed, or no probe passed; pass --checkpoint last")
    last = checkpoint.read(checkpoint.path_of(folder / "checkpoints", progress.step))
    return Chosen("last", progress.step, _averaged(last, names))


def _averaged(last: checkpoint.Checkpoint, names: Sequence[str]) -> dict[str, Tensor]:
    """The averaged weights of a run that has them (`optimizer.ema`): they are what its probes measured."""
    return {name: last.average[str(i)] for i, name in enumerate(names)} if last.average else last.policy
