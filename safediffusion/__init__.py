"""SafeDiffusion: make a text-to-image diffusion model safe by online reinforcement learning, and prove it."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Name to module: nothing is imported before it is asked for, so that `import safediffusion` is quick.
_PUBLIC = {
    "Recipe": "recipe",
    "UserError": "errors",
    "load_policy": "policies.latent",
    "load_recipe": "training",
    "measure": "measurement",
    "post_train": "training",
    "write_report": "report.page",
}
__all__ = ["Recipe", "UserError", "__version__", "load_policy", "load_recipe", "measure", "post_train", "write_report"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'safediffusion' has no attribute {name!r}")
    return getattr(importlib.import_module(f"safediffusion.{_PUBLIC[name]}"), name)
