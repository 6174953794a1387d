"""Numbers with their uncertainty: every reported number carries a count and a 95 % interval.

Prompts are the sampling unit: K pictures of one prompt resemble each other, so resampling pictures would make
intervals too narrow. A missing measurement is NaN and is counted out, never taken for 0.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95
RESAMPLES = 2000
# Drawing all resamples at once for 30,000 prompts would take half a gigabyte; this many indices take 32 MiB.
INDICES_AT_ONCE = 2**22


@dataclass(frozen=True)
class Estimate:
    """A value, its 95 % interval and the number `n` of measurements behind it. NaN means not measured."""

    value: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, float | int]:
        """The form that `results.json` holds."""
        return asdict(self)


def rate(successes: ArrayLike) -> Estimate:
    """Share of 1s among 0/1 values with the Wilson interval, which stays inside [0, 1] and is honest at 0 of n.

    It takes the values as independent: give it one picture per prompt, or use `mean_over_prompts`.
    """
    from scipy.stats import binomtest

    values = np.asarray(successes, dtype=np.float64).ravel()
    values = values[~np.isnan(values)]
    if not np.isin(values, (0.0, 1.0)).all():
        raise ValueError("rate counts successes: every value must be 0, 1 or NaN; use mean_over_prompts for scores")
    if values.size == 0:
        return Estimate(np.nan, np.nan, np.nan, 0)
    interval = binomtest(int(values.sum()), values.size).proportion_ci(CONFIDENCE, method="wilson")
    return Estimate(float(values.mean()), float(interval.low), float(interval.high), values.size)


def mean_over_prompts(values: ArrayLike, seed: int) -> Estimate:
    """Mean of the prompt means of `(P, K)` values (or `(P,)`), with a percentile bootstrap over prompts.

    Every prompt weighs the same, however many of its pictures were measured. `n` counts the values that are there.
    One prompt has no spread to resample: its interval is NaN rather than a point.
    """
    values = _by_prompt(values)
    counts = (~np.isnan(values)).sum(axis=1)  # (P,)
    measured = counts > 0
    means = np.nansum(values[measured], axis=1) / counts[measured]
    if means.size == 0:
        return Estimate(np.nan, np.nan, np.nan, 0)
    low, high = _bootstrap_interval(means, seed) if means.size > 1 else (np.nan, np.nan)
    return Estimate(float(means.mean()), low, high, int(counts.sum()))


def paired_change(base: ArrayLike, trained: ArrayLike, seed: int) -> Estimate:
    """Mean of trained - base over pairs of the same prompt and seed, `(P, K)` each, bootstrapped over prompts.

    Differences are taken before resampling, so what makes a prompt hard for both models cancels. A pair with
    either half missing is counted out, and `n` counts the pairs.
    """
    base, trained = _by_prompt(base), _by_prompt(trained)
    if base.shape != trained.shape:
        raise ValueError(f"a paired change needs the same prompts and seeds for both models, got {base.shape} and {trained.shape}")
    return mean_over_prompts(trained - base, seed)


def significantly_below(change: Estimate) -> bool:
    """Whether the whole interval lies below zero. False when nothing was measured."""
    return bool(change.high < 0)


def significantly_above(change: Estimate) -> bool:
    """Whether the whole interval lies above zero. False when nothing was measured."""
    return bool(change.low > 0)


def _by_prompt(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim == 1:
        array = array[:, None]
    if array.ndim != 2:
        raise ValueError(f"values must be (prompts, pictures per prompt), got shape {array.shape}")
    return array


def _bootstrap_interval(means: NDArray[np.float64], seed: int) -> tuple[float, float]:
    generator = np.random.default_rng(seed)
    rows = max(1, INDICES_AT_ONCE // means.size)
    resampled = [means[generator.integers(means.size, size=(min(rows, RESAMPLES - start), means.size))].mean(axis=1) for start in range(0, RESAMPLES, rows)]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.concatenate(resampled), (tail, 1 - tail))
    return float(low), float(high)
