"""A diffusers scheduler's config to the process that it asks for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safediffusion.errors import UserError
from safediffusion.process.diffusion import diffusion_grid
from safediffusion.process.flow import flow_grid
from safediffusion.process.gaussian import Gaussian, Solver
from safediffusion.process.settings import ProcessSettings


def from_scheduler(
    config: Mapping[str, Any],
    steps: int,
    eta: float = 1.0,
    solver: Solver = "ddim",
    guidance_range: tuple[float, float] = (0.0, 1.0),
    tokens: int | None = None,
) -> Gaussian:
    """The grid that diffusers would walk in `steps` steps: by DDIM for a VP scheduler's config, by Euler for a flow's.

    `tokens` is how many the image has (`flow.tokens_in`), by which some flows shift their times; others need none.
    Raises ValueError for any other config, and for a number of steps that the schedule cannot hold.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1; got {steps}")
    name = str(config.get("_class_name", ""))
    if "beta_schedule" in config:
        schedule, times, prediction_type = diffusion_grid(config, steps)
    elif name.startswith("FlowMatch"):
        schedule, times, prediction_type = flow_grid(config, steps, tokens)
    else:
        raise ValueError(f"the scheduler {name or 'config'} is neither of a VP diffusion (it has no beta_schedule) nor of a flow (its class is no FlowMatch...)")
    return Gaussian(schedule, times, eta, prediction_type, solver=solver, guidance_range=guidance_range)


def from_settings(options: ProcessSettings, folder: Path, config: Mapping[str, Any], tokens: int) -> Gaussian:
    """The grid of a recipe on the scheduler's `config` of the model in `folder`. UserError for one that has no such grid."""
    return of_folder(folder, config, options.steps, tokens, eta=options.eta, solver=options.solver, guidance_range=options.guidance_range)


def of_folder(folder: Path, config: Mapping[str, Any], steps: int, tokens: int, **options: Any) -> Gaussian:
    """`from_scheduler` with the config of the model in `folder`, and a UserError that names it."""
    try:
        return from_scheduler(config, steps, tokens=tokens, **options)
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"{steps} denoising steps with the scheduler of {folder}: {error}") from None
