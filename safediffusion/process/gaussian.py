"""One denoising step as a Gaussian kernel, for every model family (docs/method.md section 3).

`x_t = a_t x_0 + s_t e`; a schedule says what signal a and noise s are. One step from t to an earlier u is equations 12 and 16
of DDIM (arXiv 2010.02502), written for any a and s: eta = 1 is the posterior of DDPM, eta = 0 is deterministic. For a
rectified flow it is the coefficient-preserving sampler (arXiv 2509.05952), and at eta = 0 Euler's step. Every prediction
type is linear in the latent and the output, so two pairs of coefficients per type are all there is to convert.

DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2) is the deterministic step plus a multiple of how far x0^ moved since
the step before: its first-order step is DDIM's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from safediffusion.types import Kernel

PredictionType = Literal["epsilon", "v_prediction", "sample", "velocity"]
Solver = Literal["ddim", "dpm++2m"]


class Schedule(Protocol):
    """How much signal and noise a latent has at each training time. Times are `(B,)` tensors in the unit that the network was trained with.

    top: the noisiest time.
    final: powers of the finished latent.
    """

    @property
    def top(self) -> float: ...
    @property
    def final(self) -> tuple[float, float]: ...
    def powers(self, time: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """a^2 and s^2 at each time, both `(B,)`, on its device."""
        ...

    def time_at(self, share: Tensor) -> Tensor:
        """The times at shares of the schedule in [0, 1], from less noise to more."""
        ...

    def share_of(self, time: float) -> float:
        """Inverse of `time_at`."""
        ...


class Mix(NamedTuple):
    """`x * latent + output * prediction`; floats for one step, `(B, 1, 1, 1)` for many times."""

    x: float | Tensor
    output: float | Tensor

    def __call__(self, x: Tensor, output: Tensor) -> Tensor:
        return self.x * x.float() + self.output * output.float()


def mixes(prediction_type: PredictionType, a: float | Tensor, s: float | Tensor) -> tuple[Mix, Mix]:
    """How latent and prediction mix into x0^ and into e^.

    The v of arXiv 2202.00512 is `a e - s x_0`; the velocity of a rectified flow, where a + s = 1, is `e - x_0`.
    """
    if prediction_type == "epsilon":
        return Mix(1 / a, -s / a), Mix(0.0, 1.0)
    if prediction_type == "v_prediction":
        return Mix(a, -s), Mix(s, a)
    if prediction_type == "velocity":
        return Mix(1.0, -s), Mix(1.0, a)
    return Mix(0.0, 1.0), Mix(1 / s, -a / s)


class Step(NamedTuple):
    """The constants of one step, Python floats: `mean = signal * x0^ + direction * e^`."""

    x0: Mix
    epsilon: Mix
    signal: float
    direction: float
    std: float
    momentum: float  # of the change of x0^ since the step before; 0 where the step is of first order


@dataclass(frozen=True, eq=False)
class Gaussian:
    """A denoising grid of N steps over a schedule; `safediffusion.process.from_scheduler` makes one.

    times: `(N,)`, decreasing, long or float as the schedule has them, on the CPU whatever the model's device; step i goes from
        times[i] to times[i + 1], the last one to the finished latent.
    eta: noise of a step relative to DDPM's, in [0, 1]. 0 leaves no log-probabilities to train on.
    prediction_type: what the network outputs, in the words of diffusers.
    window: the steps that add that noise; None is all.
    solver: of the steps that add none.
    guidance_range: shares of the schedule between which guidance acts.

    The last step never adds noise, at any eta: it would stay in the image that is scored.
    Raises ValueError for an eta, prediction type or grid that has no such process.
    """

    schedule: Schedule
    times: Tensor
    eta: float = 1.0
    prediction_type: PredictionType = "epsilon"
    window: tuple[int, ...] | None = None
    solver: Solver = "ddim"
    guidance_range: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be in [0, 1], from deterministic to DDPM; got {self.eta}")
        if self.prediction_type not in get_args(PredictionType):
            raise ValueError(f"prediction_type must be one of {get_args(PredictionType)}; got {self.prediction_type!r}")
        times, top = self.times.tolist(), self.schedule.top
        if not times:
            raise ValueError("times is empty; a process has at least one step")
        if times[0] > top or times[-1] < 0 or any(t <= u for t, u in pairwise(times)):
            raise ValueError(
                f"times must decrease within [0, {top:g}]; got {times[0]} to {times[-1]} in {len(times)} steps. "
                "Choose another number of steps, or another timestep_spacing or steps_offset"
            )
        if self.prediction_type == "epsilon" and self.schedule.powers(self.times[:1])[0] == 0:
            raise ValueError(
                f'time {times[0]} has no signal (rescale_betas_zero_snr), where epsilon says nothing of the image; it takes a model with prediction_type "v_prediction"'
            )

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """The constants of all N steps, computed once, in double precision: the loop never waits for a device."""
        signals, noises = (power.tolist() for power in self.schedule.powers(self.times, torch.float64))
        here = list(zip(signals, noises, strict=True))
        there = [*here[1:], self.schedule.final]
        noisy = set(range(len(here) - 1)) & set(range(len(here)) if self.window is None else self.window)
        steps = []
        for i, ((signal_t, noise_t), (signal_u, noise_u)) in enumerate(zip(here, there, strict=True)):
            eta = self.eta if i in noisy else 0.0
            variance = eta**2 * noise_u * (1 - signal_t * noise_u / (signal_u * noise_t))
            x0, epsilon = mixes(self.prediction_type, math.sqrt(signal_t), math.sqrt(noise_t))
            direction = math.sqrt(max(0.0, noise_u - variance))  # rounding can pass below 0 at zero signal
            momentum = 0.0 if variance or i == 0 else self._momentum(here[i - 1], here[i], there[i], last=i == len(here) - 1)
            steps.append(Step(x0, epsilon, math.sqrt(signal_u), direction, math.sqrt(variance), momentum))
        return tuple(steps)

    def _momentum(self, *powers: tuple[float, float], last: bool) -> float:
        """The second-order term of DPM-Solver++(2M), `a_u (1 - exp(-h)) / (2 r)` with h and h / r the log-SNR steps ahead and behind.

        `powers` are those of the step before, of t and of u. Of first order, as in diffusers, are a step after one without any
        signal, a last step that ends without noise and the last of fewer than 15.
        """
        (signal_before, _), _, (signal_u, noise_u) = powers
        if self.solver == "ddim" or signal_before == 0 or (last and (noise_u == 0 or len(self.times) < 15)):
            return 0.0
        before, here, there = (0.5 * math.log(signal / noise) for signal, noise in powers)
        ahead, behind = there - here, here - before
        return math.sqrt(signal_u) * -math.expm1(-ahead) * ahead / (2 * behind)

    def guides(self, step: int) -> bool:
        """Whether guidance acts in this step."""
        low, high = self.guidance_range
        return low <= self.share_of(self.times[step].item()) <= high

    def advance(self, output: Tensor, x: Tensor, step: int, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """The next latent of a step without noise, and its x0^, both `(B, C, H, W)` float32.

        `before` is the x0^ of the step before where that was without noise too; None makes the step one of first order.
        """
        x0, epsilon = self.split(output, x, step)
        constants = self.steps[step]
        x = constants.signal * x0 + constants.direction * epsilon
        return (x if before is None or not constants.momentum else x + constants.momentum * (x0 - before)), x0

    @property
    def stochastic_steps(self) -> tuple[int, ...]:
        """Steps that add noise, the only ones with a log-probability: all but the last, or none at eta = 0."""
        return tuple(i for i, step in enumerate(self.steps) if step.std > 0)

    def split(self, output: Tensor, x: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """The clean latent x0^ and noise e^ that `output` claims for the latent `x`; all `(B, C, H, W)`, float32."""
        constants = self.steps[step]
        return constants.x0(x, output), constants.epsilon(x, output)

    def kernel(self, output: Tensor, x: Tensor, step: int) -> Kernel:
        """The Gaussian of the next latent, from the network's `output` at `x`, both `(B, C, H, W)`; float32."""
        x0, epsilon = self.split(output, x, step)
        constants = self.steps[step]
        return Kernel(constants.signal * x0 + constants.direction * epsilon, constants.std)

    def sensitivity(self, step: int) -> float:
        """How many standard deviations the kernel's mean moves per unit of the network's output, `|c| / std`.

        The log-ratio of a step grows with it and the KL with its square; dividing log-ratios by it (ratio
        normalisation) gives every step the same say. On SD1.x's grid the last stochastic step, which lands on time 1,
        is eight times more sensitive than the median step, at 10 as at 50 steps. For epsilon,
        `c = direction - signal * s_t / a_t`; another output is taken in its own unit, finite at zero signal too.
        Raises ValueError for a deterministic step.
        """
        x0, epsilon, signal, direction, std, _ = self.steps[step]
        if std == 0:
            raise ValueError(f"step {step} is deterministic; only steps {self.stochastic_steps} have a log-probability")
        return abs(signal * x0.output + direction * epsilon.output) / std

    def time_at(self, share: Tensor) -> Tensor:
        """The training times at shares of the schedule in [0, 1], from less noise to more; of the shape of `share`."""
        return self.schedule.time_at(share)

    def share_of(self, time: float) -> float:
        """The share of the schedule at which a training time lies."""
        return self.schedule.share_of(time)

    def noised(self, clean: Tensor, noise: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """The latent at `time` (`(B,)`, any training times) and what the network should output there, float32.

        `clean` and the standard-normal `noise` are `(B, C, H, W)`.
        """
        a, s = self.signal_and_noise(time.to(clean.device))
        clean, noise = clean.float(), noise.float()
        targets = {"epsilon": noise, "v_prediction": a * noise - s * clean, "sample": clean, "velocity": noise - clean}
        return a * clean + s * noise, targets[self.prediction_type]

    def to_epsilon(self, output: Tensor, x: Tensor, time: Tensor) -> Tensor:
        """The noise e^ that `output` claims for `x`, both `(B, C, H, W)`, at `time`, `(B,)`; float32.

        Losses and KLs over mixed times are taken in this space: x0 space weights the noisiest times 100 times more.
        """
        _, epsilon = mixes(self.prediction_type, *self.signal_and_noise(time.to(x.device)))
        return epsilon(x, output)

    def signal_and_noise(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """a and s at each time, both `(B, 1, 1, 1)` float32, on its device."""
        signal, noise = (power.sqrt().view(-1, 1, 1, 1) for power in self.schedule.powers(time))
        return signal, noise
