"""One stochastic denoising step, the same object for sampling and for scoring, for every model family."""

from safediffusion.process.scheduler import from_scheduler, from_settings

__all__ = ["from_scheduler", "from_settings"]
