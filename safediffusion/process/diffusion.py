"""The variance-preserving process of SD1.x, SD2.x and SDXL: DDIM with eta, as a Gaussian kernel; DPM-Solver++(2M) between.

`x_t = a_t x_0 + s_t e` with `a = sqrt(abar)`, `s = sqrt(1 - abar)`. One step from t to an earlier u is equations 12 and
16 of DDIM (arXiv 2010.02502); eta = 1 is the posterior of DDPM, eta = 0 is deterministic. Every prediction type is
linear in the latent and the output, so two pairs of coefficients per type are all there is to convert.

DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2) is DDIM's deterministic step plus a multiple of how far x0^ moved since
the step before: its first-order step is DDIM's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Annotated, Any, Literal, NamedTuple, get_args

import torch
from pydantic import Field
from torch import Tensor

from safediffusion.config import settings
from safediffusion.types import Kernel

PredictionType = Literal["epsilon", "v_prediction", "sample"]
Solver = Literal["ddim", "dpm++2m"]
Share = Annotated[float, Field(ge=0, le=1)]


class Mix(NamedTuple):
    """`x * latent + output * prediction`; floats for one step, `(B, 1, 1, 1)` for many times."""

    x: float | Tensor
    output: float | Tensor

    def __call__(self, x: Tensor, output: Tensor) -> Tensor:
        return self.x * x.float() + self.output * output.float()


def mixes(prediction_type: PredictionType, a: float | Tensor, s: float | Tensor) -> tuple[Mix, Mix]:
    """How latent and prediction mix into x0^ and into e^. The v of arXiv 2202.00512 is `a e - s x_0`."""
    if prediction_type == "epsilon":
        return Mix(1 / a, -s / a), Mix(0.0, 1.0)
    if prediction_type == "v_prediction":
        return Mix(a, -s), Mix(s, a)
    return Mix(0.0, 1.0), Mix(1 / s, -a / s)


@settings
class ProcessSettings:
    """How training pictures are painted."""

    kind: Literal["diffusion"] = "diffusion"
    steps: int = Field(default=10, ge=2)  # denoising steps; the cost of a rollout
    eta: float = Field(default=0.0, ge=0, le=1)  # 0 is deterministic DDIM, 1 DDPM's noise; grpo needs more than 0
    guidance: float = Field(default=1.0, ge=0)  # classifier-free guidance; 1 runs the conditional branch alone, less explores more
    guidance_range: tuple[Share, Share] = (0.0, 1.0)  # of the schedule, from less noise to more, where guidance acts (arXiv 2404.07724); outside, one branch
    solver: Solver = "ddim"  # of the steps without noise; "dpm++2m" is of second order: as good in half the steps


class Step(NamedTuple):
    """The constants of one step, Python floats: `mean = signal * x0^ + direction * e^`."""

    x0: Mix
    epsilon: Mix
    signal: float
    direction: float
    std: float
    momentum: float  # of the change of x0^ since the step before; 0 where the step is of first order


@dataclass(frozen=True, eq=False)
class Diffusion:
    """A denoising grid of N steps over a VP noise schedule of M training times (M = 1000 for Stable Diffusion).

    alphas_cumprod: `(M,)` float, `abar` at each training time, on the CPU whatever the model's device.
    times: `(N,)` long, decreasing; step i goes from times[i] to times[i + 1], the last one to `final_alpha_cumprod`.
    eta: noise of a step relative to DDPM's, in [0, 1]. 0 leaves no log-probabilities to train on.
    window: the steps that add that noise; None is all.
    solver: of the steps that add none.
    guidance_range: shares of the schedule between which guidance acts.
    prediction_type: what the network outputs, in the words of diffusers.
    final_alpha_cumprod: `abar` of the finished latent; SD ships abar at time 0 (`set_alpha_to_one = False`).

    The last step never adds noise, at any eta: it would stay in the image that is scored.
    Raises ValueError for an eta, prediction type or grid that has no such process.
    """

    alphas_cumprod: Tensor
    times: Tensor
    eta: float = 1.0
    prediction_type: PredictionType = "epsilon"
    final_alpha_cumprod: float = 1.0
    window: tuple[int, ...] | None = None
    solver: Solver = "ddim"
    guidance_range: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be in [0, 1], from deterministic to DDPM; got {self.eta}")
        if self.prediction_type not in get_args(PredictionType):
            raise ValueError(f"prediction_type must be one of {get_args(PredictionType)}; got {self.prediction_type!r}")
        times, top = self.times.tolist(), len(self.alphas_cumprod) - 1
        if not times:
            raise ValueError("times is empty; a process has at least one step")
        if times[0] > top or times[-1] < 0 or any(t <= u for t, u in pairwise(times)):
            raise ValueError(
                f"times must decrease within [0, {top}]; got {times[0]} to {times[-1]} in {len(times)} steps. "
                "Choose another number of steps, or another timestep_spacing or steps_offset"
            )
        if self.prediction_type == "epsilon" and self.alphas_cumprod[times[0]] == 0:
            raise ValueError(
                f'time {times[0]} has no signal (rescale_betas_zero_snr), where epsilon says nothing of the image; it takes a model with prediction_type "v_prediction"'
            )

    @classmethod
    def from_scheduler(
        cls, config: Mapping[str, Any], steps: int, eta: float = 1.0, solver: Solver = "ddim", guidance_range: tuple[float, float] = (0.0, 1.0)
    ) -> Diffusion:
        """The grid that diffusers' DDIMScheduler would walk in `steps` steps, from any VP scheduler's config.

        A config without `clip_sample` is read as one that does not clip, because latents are not confined to [-1, 1].
        Raises ValueError for a config that clips or thresholds, or is not VP (SD3, FLUX), and for a number of steps
        that the schedule cannot hold. Where the spacing is uneven (linspace, or trailing with steps that do not divide
        M) a step lands on the next time of the grid, as in DDPMScheduler; DDIMScheduler lands M // steps below.
        """
        from diffusers import DDIMScheduler

        if steps < 1:
            raise ValueError(f"steps must be at least 1; got {steps}")
        if "beta_schedule" not in config:
            raise ValueError("the scheduler config has no beta_schedule: it is not of a VP diffusion (a flow model?)")
        # Passed apart from the config, because from_config drops keys that the config lists as defaults.
        scheduler = DDIMScheduler.from_config(dict(config), clip_sample=config.get("clip_sample", False))
        if scheduler.config.clip_sample or scheduler.config.thresholding:
            raise ValueError("clipping x0 is not supported: set clip_sample and thresholding to false in the config")
        scheduler.set_timesteps(steps)
        return cls(
            alphas_cumprod=scheduler.alphas_cumprod,
            times=scheduler.timesteps,
            eta=eta,
            prediction_type=scheduler.config.prediction_type,
            final_alpha_cumprod=float(scheduler.final_alpha_cumprod),
            solver=solver,
            guidance_range=guidance_range,
        )

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """The constants of all N steps, computed once, in double precision: the loop never waits for a device."""
        here = self.alphas_cumprod.double()[self.times].tolist()
        there = [*here[1:], self.final_alpha_cumprod]
        noisy = set(range(len(here) - 1)) & set(range(len(here)) if self.window is None else self.window)
        steps = []
        for i, (abar_t, abar_u) in enumerate(zip(here, there, strict=True)):
            eta = self.eta if i in noisy else 0.0
            variance = eta**2 * (1 - abar_u) / (1 - abar_t) * (1 - abar_t / abar_u)
            x0, epsilon = mixes(self.prediction_type, math.sqrt(abar_t), math.sqrt(1 - abar_t))
            direction = math.sqrt(max(0.0, 1 - abar_u - variance))  # rounding can pass below 0 at zero signal
            momentum = 0.0 if variance or i == 0 else self._momentum(here[i - 1], abar_t, abar_u, last=i == len(here) - 1)
            steps.append(Step(x0, epsilon, math.sqrt(abar_u), direction, math.sqrt(variance), momentum))
        return tuple(steps)

    def _momentum(self, abar_before: float, abar_t: float, abar_u: float, last: bool) -> float:
        """The second-order term of DPM-Solver++(2M), `a_u (1 - exp(-h)) / (2 r)` with h and h / r the log-SNR steps ahead and behind.

        Of first order, as in diffusers, are a last step that ends without noise and the last of fewer than 15.
        """
        if self.solver == "ddim" or abar_before == 0 or (last and (abar_u == 1 or len(self.times) < 15)):
            return 0.0
        before, here, there = (0.5 * math.log(abar / (1 - abar)) for abar in (abar_before, abar_t, abar_u))
        ahead, behind = there - here, here - before
        return math.sqrt(abar_u) * -math.expm1(-ahead) * ahead / (2 * behind)

    def guides(self, step: int) -> bool:
        """Whether guidance acts in this step."""
        low, high = (share * len(self.alphas_cumprod) for share in self.guidance_range)
        return low <= int(self.times[step]) <= high

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

    def noised(self, clean: Tensor, noise: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """The latent at `time` (`(B,)` long, any training time) and what the network should output there, float32.

        `clean` and the standard-normal `noise` are `(B, C, H, W)`.
        """
        a, s = self._signal_and_noise(time, clean)
        clean, noise = clean.float(), noise.float()
        targets = {"epsilon": noise, "v_prediction": a * noise - s * clean, "sample": clean}
        return a * clean + s * noise, targets[self.prediction_type]

    def to_epsilon(self, output: Tensor, x: Tensor, time: Tensor) -> Tensor:
        """The noise e^ that `output` claims for `x`, both `(B, C, H, W)`, at `time`, `(B,)` long; float32.

        Losses and KLs over mixed times are taken in this space: x0 space weights the noisiest times 100 times more.
        """
        _, epsilon = mixes(self.prediction_type, *self._signal_and_noise(time, x))
        return epsilon(x, output)

    def _signal_and_noise(self, time: Tensor, x: Tensor) -> Tensor:
        """a and s at each time, stacked `(2, B, 1, 1, 1)`, on the device of `x`."""
        table = torch.stack([self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt()]).float()
        return table.to(x.device)[:, time.to(x.device)].view(2, -1, 1, 1, 1)
