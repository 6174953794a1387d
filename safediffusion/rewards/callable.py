"""A reward of the user's own: any function of pictures and prompts, named `module:attribute` in the recipe."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from safediffusion.config import settings
from safediffusion.errors import UserError
from safediffusion.rewards.scores import RESERVED, Measures, checked
from safediffusion.types import Prompt, Scores

Function = Callable[[Tensor, Sequence[Prompt]], Tensor | Scores]


@settings
class CallableSettings:
    """A `[reward]` table of kind "callable"."""

    kind: Literal["callable"] = "callable"
    # `module:attribute`; the module must be importable, so its folder is installed or on PYTHONPATH.
    function: str
    # Whether gradients flow through the function to the pictures; only algorithms that need the gradient ask.
    differentiable: bool = False

    measures: ClassVar[Measures | None] = None  # nobody knows before it is called


@dataclass(frozen=True, eq=False)
class CallableReward:
    """Wraps `function(images, prompts)`, which gives `(B,)` or Scores, so that its mistakes are reported under `name`."""

    function: Function
    name: str
    differentiable: bool = False

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        try:
            scores = self.function(images, prompts)
        except torch.OutOfMemoryError:
            raise  # the loop tries again with fewer pictures at once
        except (Exception, SystemExit) as error:
            raise UserError(f"the reward '{self.name}' failed: {type(error).__name__}: {error}") from error
        if isinstance(scores, Tensor):
            scores = Scores(scores, {self.name: scores})
        if not isinstance(scores, Scores):
            raise UserError(f"the reward '{self.name}' gave a {type(scores).__name__}; it must give a tensor (B,) or Scores")
        if taken := next((part for part in scores.parts if part in RESERVED), None):
            raise UserError(f"the reward '{self.name}' gave a part {taken!r}, which is what metrics and constraints call something else; give it another name")
        return checked(scores, len(images), self.name, "mend the function" if bool(torch.isfinite(images).all()) else "the pictures hold NaN: lower the learning rate")


def load_callable(name: str) -> Function:
    """The function that `module:attribute` names."""
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise UserError(f"'{name}' names no function; write module:attribute, such as my_rewards:brightness")
    try:
        imported = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # whatever a user's module does while it is imported
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            raise UserError(f"'{name}': cannot import {module} ({error}); is its folder on PYTHONPATH?") from error
        raise UserError(f"'{name}': importing {module} failed ({type(error).__name__}: {error}); mend the module") from error
    try:
        function = getattr(imported, attribute)
    except AttributeError as error:
        raise UserError(f"'{name}': {module} has no {attribute}") from error
    if not callable(function):
        raise UserError(f"'{name}' is of the type {type(function).__name__}, and not a function of (images, prompts)")
    return function
