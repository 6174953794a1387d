"""An exponential moving average of the trained parameters; with decay 0 it is the parameters themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class Average:
    """Smooths the noise of online RL. `decay` is warmed up as min(decay, (1 + n) / (10 + n)) after n updates."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter], decay: float) -> None:
        self._parameters, self._decay, self._count = tuple(parameters), decay, 0
        self._mean = [p.detach().clone() for p in self._parameters] if decay else []

    @torch.no_grad()
    def update(self) -> None:
        if not self._decay:
            return
        keep = min(self._decay, (1 + self._count) / (10 + self._count))
        torch._foreach_lerp_(self._mean, [p.detach() for p in self._parameters], 1 - keep)
        self._count += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the parameters are their average."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, mean in zip(self._parameters, self._mean, strict=False):
            kept = parameter.detach().clone()
            parameter.copy_(mean)
            mean.copy_(kept)

    def state(self) -> dict[str, Tensor]:
        if not self._decay:
            return {}
        return {str(i): mean for i, mean in enumerate(self._mean)} | {"count": torch.tensor(self._count)}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        if self._decay and state:
            for i, mean in enumerate(self._mean):
                mean.copy_(state[str(i)])
            self._count = int(state["count"])
