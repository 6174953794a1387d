"""The table [process] of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from safediffusion.config import Interval, settings
from safediffusion.process.gaussian import Solver


@settings
class ProcessSettings:
    """How training pictures are painted; the same for variance-preserving models and for flows, as the model's scheduler has it."""

    kind: Literal["diffusion"] = "diffusion"
    steps: int = Field(default=10, ge=2)  # denoising steps; the cost of a rollout
    eta: float = Field(default=0.0, ge=0, le=1)  # 0 is deterministic DDIM (Euler's steps of a flow), 1 DDPM's noise; grpo needs more than 0
    guidance: float = Field(default=1.0, ge=0)  # classifier-free guidance; 1 runs the conditional branch alone, less explores more
    guidance_range: Interval = (0.0, 1.0)  # of the schedule, from less noise to more, where guidance acts (arXiv 2404.07724); outside, one branch
    solver: Solver = "ddim"  # of the steps without noise; "dpm++2m" is of second order: as good in half the steps, but not on SD3's grid (docs/method.md)
