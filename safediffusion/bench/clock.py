"""Where an iteration's seconds go, measured from outside: wrappers around the objects of one learner, none on the usual path."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from safediffusion.algorithms.update import Learner
from safediffusion.types import Prompt, Reward, Scores

PARTS = ("rollout", "decode", "reward", "training", "optimizer", "other")


@dataclass
class Clock:
    """Seconds by part of one iteration at a time. On a GPU events mark both ends of a part, and nothing waits until the end."""

    device: torch.device
    at_base: bool = False  # inside `policy.reference()`
    open: bool = False  # parts do not nest: the outer one has the time
    spans: list[tuple[str, Any, Any]] = field(default_factory=list)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        if self.open:
            yield
            return
        self.open, began = True, self._mark()
        try:
            yield
        finally:
            self.open = False
            self.spans.append((name, began, self._mark()))

    def timed(self, function: Callable[..., Any], name: str | Callable[[], str]) -> Callable[..., Any]:
        """`function`, its time put down to a part; a callable names the part at each call."""

        def call(*arguments: Any, **named: Any) -> Any:
            with self.part(name if isinstance(name, str) else name()):
                return function(*arguments, **named)

        return call

    def iteration(self, function: Callable[[], Any]) -> tuple[float, dict[str, float]]:
        """Seconds of a call from end to end, and how the parts share them; what no part claims is `other`."""
        self.spans.clear()
        self._wait()
        began = time.perf_counter()
        function()
        self._wait()
        whole = time.perf_counter() - began
        parts = dict.fromkeys(PARTS, 0.0)
        for name, start, end in self.spans:
            parts[name] += start.elapsed_time(end) / 1000 if self.device.type == "cuda" else end - start
        return whole, parts | {"other": whole - sum(parts.values())}

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True, eq=False)
class _TimedReward:
    reward: Reward
    clock: Clock

    @property
    def differentiable(self) -> bool:
        return self.reward.differentiable

    def __call__(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> Scores:
        with self.clock.part("reward"):
            return self.reward(images, prompts)


def watch(learner: Learner) -> Clock:
    """A clock on all that `learner` calls; the learner is for measuring from then on."""
    policy: Any = learner.policy
    clock, reference = Clock(policy.device), policy.reference

    @contextmanager
    def at_base() -> Iterator[None]:
        with reference():
            clock.at_base = True
            try:
                yield
            finally:
                clock.at_base = False

    policy.reference = at_base
    policy.predict = clock.timed(policy.predict, lambda: "training" if torch.is_grad_enabled() or clock.at_base else "rollout")
    policy.sketch = clock.timed(policy.sketch, "decode")
    learner.reward = learner.reward and _TimedReward(learner.reward, clock)
    accelerator: Any = learner.accelerator
    accelerator.backward = clock.timed(accelerator.backward, "training")
    accelerator.clip_grad_norm_ = clock.timed(accelerator.clip_grad_norm_, "optimizer")
    optimizer: Any = learner.optimizer
    optimizer.step = clock.timed(optimizer.step, "optimizer")
    return clock
