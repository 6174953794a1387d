"""Where a run ends before its steps are done: for methods that are compared at equal cost."""

from __future__ import annotations

from pydantic import Field

from safediffusion.config import settings


@settings
class Limit:
    """A run ends with the first iteration that reaches one of these. A falling learning rate goes by the share of it that is used, and by
    the steps where they are nearer their end.
    """

    forwards: float | None = Field(default=None, gt=0)  # of one image through the denoiser; a backward counts as two
    cpu_seconds: float | None = Field(default=None, gt=0)  # of all processes, without building and probing; with schedule = "linear" no two runs are then bit-equal
    wall_seconds: float | None = Field(default=None, gt=0)  # the same by the clock on the wall: what counts on a GPU that a run has for itself

    def share(self, forwards: float, cpu_seconds: float, wall_seconds: float) -> float:
        """How much of it is used, from 0; 1 and more is the end."""
        used = ((forwards, self.forwards), (cpu_seconds, self.cpu_seconds), (wall_seconds, self.wall_seconds))
        return max(spent / most if most else 0.0 for spent, most in used)
