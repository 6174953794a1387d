"""The nouns that rooms hand to each other. Shapes: B images, K images per prompt, D numbers per latent.

Images are float `(B, 3, H, W)` in [0, 1]; scores are `(B,)`, higher is better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Kernel:
    """The Gaussian of one denoising step, `x_u ~ N(mean, std^2)`, in float32.

    `mean` is `(B, C, H, W)`; `std` is a float, 0 for a deterministic step. Both sampling and scoring go through this
    object, so the policy that is trained is the policy that was sampled.
    """

    mean: Tensor
    std: float

    def sample(self, noise: Tensor) -> Tensor:
        """The next latent for standard-normal `noise` of the same shape as `mean`."""
        return self.mean + self.std * noise

    def log_prob(self, x_next: Tensor) -> Tensor:
        """Log-density summed over the D dimensions of a sample, `(B,)`. Raises ValueError for a deterministic step."""
        if self.std <= 0:
            raise ValueError("a deterministic step (std = 0) has no log-probability; use eta > 0 or skip this step")
        z = (x_next.float() - self.mean) / self.std
        return (-0.5 * z.square() - math.log(self.std) - 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)

    def kl(self, other: Kernel) -> Tensor:
        """KL(self || other) for kernels of the same std: `||mean - mean'||^2 / (2 std^2)`, summed over D, `(B,)`."""
        if self.std <= 0:
            raise ValueError("the KL between two deterministic steps is not finite")
        return (self.mean - other.mean).square().flatten(1).sum(1) / (2 * self.std**2)


@dataclass(frozen=True)
class Scores:
    """What a reward says of B images: `total` is `(B,)`, `parts` are the named addends or measures, each `(B,)`.

    `embedding` (B, D) holds the unit vectors that the reward saw the images as, where it sees them as vectors.
    """

    total: Tensor
    parts: dict[str, Tensor]
    embedding: Tensor | None = None

    def __getitem__(self, index: Tensor) -> Scores:
        """Those of the images at `index` (long, on the same device)."""
        parts = {name: part[index] for name, part in self.parts.items()}
        return Scores(self.total[index], parts, None if self.embedding is None else self.embedding[index])


@dataclass(frozen=True)
class Prompt:
    """One line of a prompt set. `unsafe` routes it to the steered target; `task` is the kind of composition that it asks for."""

    text: str
    unsafe: bool = False
    task: str = ""


Class = Literal["unsafe", "safe", "all"]


def mask(prompts: Sequence[Prompt], which: Class, device: torch.device) -> Tensor:
    """1 for the pictures of that class of prompts, `(B,)` float."""
    return torch.tensor([which == "all" or prompt.unsafe == (which == "unsafe") for prompt in prompts], dtype=torch.float32, device=device)


class Process(Protocol):
    """The denoising grid. `times` is `(N,)`, decreasing, long or float as the network was trained; step i goes from times[i] to times[i + 1] (clean at the end)."""

    times: Tensor

    @property
    def stochastic_steps(self) -> tuple[int, ...]: ...
    def kernel(self, output: Tensor, x: Tensor, step: int) -> Kernel: ...
    def advance(self, output: Tensor, x: Tensor, step: int, before: Tensor | None) -> tuple[Tensor, Tensor]: ...
    def guides(self, step: int) -> bool: ...
    def time_at(self, share: Tensor) -> Tensor: ...
    def share_of(self, time: float) -> float: ...
    def signal_and_noise(self, time: Tensor) -> tuple[Tensor, Tensor]: ...
    def noised(self, clean: Tensor, noise: Tensor, time: Tensor) -> tuple[Tensor, Tensor]: ...
    def to_epsilon(self, output: Tensor, x: Tensor, time: Tensor) -> Tensor: ...
    def sensitivity(self, step: int) -> float: ...


class Policy(Protocol):
    """A text-to-image model behind the border: nothing past here knows which family it is."""

    sample_shape: tuple[int, int, int]
    network: torch.nn.Module
    scheduler_config: dict[str, Any]

    @property
    def sharded(self) -> bool: ...
    def encode(self, prompts: Sequence[str]) -> Any: ...
    def predict(self, x: Tensor, time: Tensor, condition: Any, guidance: float | Tensor = 1.0, stop: bool = False) -> Tensor: ...
    def decode(self, x: Tensor) -> Tensor: ...
    def sketch(self, x: Tensor) -> Tensor: ...
    def reference(self) -> AbstractContextManager[None]: ...
    def state(self) -> dict[str, Tensor]: ...
    def load_state(self, tensors: dict[str, Tensor]) -> None: ...


class Encoder(Protocol):
    """A frozen image-text encoder. Both methods return unit vectors `(B, D)`; `image` is differentiable."""

    def image(self, images: Tensor) -> Tensor: ...
    def text(self, texts: Sequence[str]) -> Tensor: ...


class Detector(Protocol):
    """Finds things in images: `(B, 3, H, W)` in [0, 1] to probabilities `(B, L)`, one column per label."""

    labels: tuple[str, ...]

    def __call__(self, images: Tensor) -> Tensor: ...


class Reward(Protocol):
    """Scores images for prompts. `differentiable` says whether gradients flow from the score to the image."""

    differentiable: bool

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores: ...


class Algorithm(Protocol):
    """How a policy is moved by rewards. `group` pictures are painted of each prompt."""

    group: int
    prompts: int

    def step(self, learner: Any, prompts: Sequence[Prompt], generator: torch.Generator) -> dict[str, float]: ...
