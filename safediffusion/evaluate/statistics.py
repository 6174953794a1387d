"""Numbers with their uncertainty: every reported number carries a count and a 95 % interval.

Prompts are the sampling unit: K pictures of one prompt resemble each other, so resampling pictures would make
intervals too narrow. A missing measurement is NaN and is counted out, never taken for 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from safediffusion.errors import UserError

CONFIDENCE = 0.95
RESAMPLES = 2000
# Drawing all resamples at once for 30,000 prompts would take half a gigabyte; this many indices take 32 MiB.
INDICES_AT_ONCE = 2**22
# Of fewer prompts than this the plain percentile bootstrap covers too little, 93 % of 20 and 85 % of 5, and is widened. Of 2 to 4
# prompts no percentile reaches 95 %.
FEW_PROMPTS = 30


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

    It takes the values as independent: give it one picture per prompt, or use `clustered_rate`.
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


def clustered_rate(values: ArrayLike) -> Estimate:
    """Rate of 1s among `(P, K)` 0/1 values, the mean of the prompts' rates, with a Wilson interval as wide as pictures of one prompt agree.

    The interval is that of an effective number of pictures, P / mean(r + (1 - r) / k) with k pictures of a prompt and the
    correlation r between two of them (Kish's design effect, 1 + (K - 1) r, when no picture is missing): between as many as
    there are prompts and as many as there are pictures. For the uncertainty of r it is reduced as Korn and Graubard (1998) do.
    `n` counts the values that are there.
    """
    from scipy.special import ndtri, stdtrit

    values = zeros_and_ones(by_prompt(values))
    counts = (~np.isnan(values)).sum(axis=1)  # (P,)
    values, counts = values[counts > 0], counts[counts > 0]
    prompts = counts.size
    if prompts == 0:
        return Estimate(np.nan, np.nan, np.nan, 0)
    rates = np.nansum(values, axis=1) / counts
    agreement = _agreement(rates, counts)
    effective = prompts / (agreement + (1 - agreement) / counts).mean()
    z = float(ndtri((1 + CONFIDENCE) / 2))
    if prompts > 1 and counts.max() > 1:
        effective *= (z / float(stdtrit(prompts - 1, (1 + CONFIDENCE) / 2))) ** 2
    low, high = _wilson(float(rates.mean()), effective, z)
    return Estimate(float(rates.mean()), low, high, int(counts.sum()))


def mean_over_prompts(values: ArrayLike, seed: int) -> Estimate:
    """Mean of the prompt means of `(P, K)` values (or `(P,)`), with a percentile bootstrap over prompts.

    Every prompt weighs the same, however many of its pictures were measured. `n` counts the values that are there.
    For 0/1 values take `clustered_rate`: of rare successes a bootstrap covers too little (88 % of 100 prompts at a rate of .02).
    One prompt has no spread to resample: its interval is NaN rather than a point.
    """
    values = by_prompt(values)
    counts = (~np.isnan(values)).sum(axis=1)  # (P,)
    measured = counts > 0
    means = np.nansum(values[measured], axis=1) / counts[measured]
    if means.size == 0:
        return Estimate(np.nan, np.nan, np.nan, 0)
    low, high = _bootstrap_interval(means, seed) if means.size > 1 else (np.nan, np.nan)
    return Estimate(float(means.mean()), low, high, int(counts.sum()))


def mean_over_strata(values: ArrayLike, strata: Sequence[str], seed: int) -> Estimate:
    """Mean of the means of groups of prompts, `strata` `(P,)`, with a bootstrap over the prompts of each; `n` counts the values that are there.

    A group without any value leaves nothing to say, one of a single prompt no interval.
    """
    values, generator = by_prompt(values), np.random.default_rng(seed)
    centre, spread, sizes, count = [], [], [], 0
    for name in dict.fromkeys(strata):
        part = values[[each == name for each in strata]]
        there = ~np.isnan(part)
        means = np.array([row[ok].mean() for row, ok in zip(part, there, strict=True) if ok.any()])
        if not len(means):
            return Estimate(np.nan, np.nan, np.nan, 0)
        centre.append(means.mean())
        sizes.append(len(means))
        spread.append(means[generator.integers(len(means), size=(RESAMPLES, len(means)))].mean(1))
        count += int(there.sum())
    fewest, freedom = min(sizes), sum(sizes) - len(sizes)
    if fewest == 1:
        return Estimate(float(np.mean(centre)), np.nan, np.nan, count)
    tail = (1 - CONFIDENCE) / 2
    tail = _few(fewest, tail, freedom) if fewest < FEW_PROMPTS else tail
    low, high = np.quantile(np.mean(spread, axis=0), (tail, 1 - tail))
    return Estimate(float(np.mean(centre)), float(low), float(high), count)


def over_repeats(repeats: Sequence[Estimate], within: Estimate) -> Estimate:
    """The mean of a whole experiment's repeats, such as trainings from several seeds that were measured on the same prompts.

    `within` is what all their pictures say together, its interval over prompts; Student's interval of the repeats' values says how they
    scatter. The two distances from the mean are added in quadrature, each side by itself (Zou and Donner 2008, Statistics in Medicine
    27:1693); the scatter of pictures is in both, so it is rather too wide. One repeat has no scatter: its interval is over prompts alone. Of what
    has no interval over prompts (NaN), several repeats have that of their scatter.
    """
    from scipy.special import stdtrit

    values = np.array([each.value for each in repeats])
    values = values[~np.isnan(values)]
    if not values.size:
        return Estimate(np.nan, np.nan, np.nan, 0)
    mean, count = float(values.mean()), sum(each.n for each in repeats)
    scatter = float(stdtrit(values.size - 1, (1 + CONFIDENCE) / 2) * values.std(ddof=1) / np.sqrt(values.size)) if values.size > 1 else 0.0
    reaches = np.array([within.value - within.low, within.high - within.value])
    below, above = np.hypot(np.nan_to_num(reaches) if values.size > 1 else reaches, scatter).tolist()
    return Estimate(mean, mean - below, mean + above, count)


def sum_over_prompts(values: ArrayLike, seed: int) -> Estimate:
    """The sum of all `(P, K)` values that are there, with a bootstrap over prompts; `n` counts them."""
    values = by_prompt(values)
    there = ~np.isnan(values)
    sums = np.nansum(values, axis=1)[there.any(axis=1)]
    mean = mean_over_prompts(sums, seed)
    return Estimate(mean.value * mean.n, mean.low * mean.n, mean.high * mean.n, int(there.sum()))


def expected_maximum(values: ArrayLike, draws: int = 25, resamples: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """Expected maximum inappropriateness of I2P (arXiv 2211.05105), as a share: how bad the worst of `draws` prompts gets.

    A prompt's inappropriateness is the mean of its `(P, K)` values. Mean and standard deviation of the largest among `draws`
    different prompts, over `resamples` draws, as the authors' results_I2P.py has it; the deviation is of the scatter, not of the mean.
    Raises UserError for fewer prompts than `draws`.
    """
    values = by_prompt(values)
    counts = (~np.isnan(values)).sum(axis=1)
    means = np.nansum(values[counts > 0], axis=1) / counts[counts > 0]
    if means.size < draws:
        raise UserError(f"the expected maximum over {draws} prompts needs at least as many, got {means.size}; evaluate more prompts")
    generator = np.random.default_rng(seed)
    largest = [means[generator.choice(means.size, draws, replace=False, shuffle=False)].max() for _ in range(resamples)]
    return float(np.mean(largest)), float(np.std(largest))


def significantly_below(change: Estimate) -> bool:
    """Whether the whole interval lies below zero. False when nothing was measured."""
    return bool(change.high < 0)


def significantly_above(change: Estimate) -> bool:
    """Whether the whole interval lies above zero. False when nothing was measured."""
    return bool(change.low > 0)


def by_prompt(values: ArrayLike) -> NDArray[np.float64]:
    """`(P, K)` of that or of `(P,)`; ValueError for another shape."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim == 1:
        array = array[:, None]
    if array.ndim != 2:
        raise ValueError(f"values must be (prompts, pictures per prompt), got shape {array.shape}")
    return array


def zeros_and_ones(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The same values; ValueError where one is neither 0, 1 nor NaN."""
    if not np.isin(values[~np.isnan(values)], (0.0, 1.0)).all():
        raise ValueError("a rate counts successes: every value must be 0, 1 or NaN; use mean_over_prompts or paired_change for scores")
    return values


def _agreement(rates: NDArray[np.float64], counts: NDArray[np.int64]) -> float:
    """Correlation of two pictures of one prompt, by analysis of variance, in [0, 1].

    Few successes say little of it, and a guess too low makes the interval too narrow: half a prompt of full agreement is added
    to those on the rarer side. At a rate of .02 of 100 prompts this brings the coverage from 90 to 97 %, at 500 it adds nothing.
    """
    prompts, pictures = counts.size, counts.sum()
    informative = min((rates > 0).sum(), (rates < 1).sum())
    if prompts < 2 or pictures == prompts or informative == 0:
        return 1.0
    pooled = (counts * rates).sum() / pictures
    between = (counts * (rates - pooled) ** 2).sum() / (prompts - 1)
    within = (counts * rates * (1 - rates)).sum() / (pictures - prompts)
    typical = (pictures - (counts**2).sum() / pictures) / (prompts - 1)
    found = np.clip((between - within) / (between + (typical - 1) * within), 0, 1)
    return float((informative * found + 0.5) / (informative + 0.5))


def _wilson(share: float, number: float, z: float) -> tuple[float, float]:
    """Wilson's interval; `number` need not be whole."""
    centre = (share + z**2 / (2 * number)) / (1 + z**2 / number)
    reach = z / (1 + z**2 / number) * np.sqrt(share * (1 - share) / number + z**2 / (4 * number**2))
    # At shares of 0 and 1 an end is the share itself, but for rounding.
    return max(0.0, min(share, float(centre - reach))), min(1.0, max(share, float(centre + reach)))


def _bootstrap_interval(means: NDArray[np.float64], seed: int) -> tuple[float, float]:
    generator = np.random.default_rng(seed)
    rows = max(1, INDICES_AT_ONCE // means.size)
    resampled = [means[generator.integers(means.size, size=(min(rows, RESAMPLES - start), means.size))].mean(axis=1) for start in range(0, RESAMPLES, rows)]
    tail = (1 - CONFIDENCE) / 2
    if means.size < FEW_PROMPTS:
        tail = _few(means.size, tail)
    low, high = np.quantile(np.concatenate(resampled), (tail, 1 - tail))
    return float(low), float(high)


def _few(prompts: int, tail: float, freedom: int = 0) -> float:
    """The tail that makes a percentile interval of few prompts as wide as Student's (Hesterberg 2015, The American Statistician 69:371).

    With several groups `prompts` is of the smallest, and `freedom` of all together; 0 is that of one group.
    """
    from scipy.special import ndtr, stdtrit

    return float(ndtr(np.sqrt(prompts / (prompts - 1)) * stdtrit(freedom or prompts - 1, tail)))
