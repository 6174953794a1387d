"""Two models on the same prompts and seeds: how much they differ, and whether by more than chance."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from safediffusion.evaluate.statistics import CONFIDENCE, Estimate, by_prompt, mean_over_prompts, zeros_and_ones

_FEW = 5  # prompts, of which the percentiles of a bootstrap reach 95 %


def paired_change(base: ArrayLike, trained: ArrayLike, seed: int) -> Estimate:
    """Mean of trained - base over pairs of the same prompt and seed, `(P, K)` each, bootstrapped over prompts.

    Differences are taken before resampling, so what makes a prompt hard for both models cancels. A pair with
    either half missing is counted out, and `n` counts the pairs. Of 0/1 values a bootstrap of few or equal differences is too narrow, down to a
    point: the interval then reaches at least as far as that of Agresti and Min (2005, Statistics in Medicine 24:729), who add half a
    prompt to each of the four outcomes of a pair, with Student's quantile. Of 2 to 4 prompts no percentile of a bootstrap reaches 95 %: the
    interval then reaches at least as far as Student's.
    """
    from scipy.special import stdtrit

    base, trained = by_prompt(base), by_prompt(trained)
    if base.shape != trained.shape:
        raise ValueError(f"a paired change needs the same prompts and seeds for both models, got {base.shape} and {trained.shape}")
    found = mean_over_prompts(trained - base, seed)
    there = (trained - base)[~np.isnan(trained - base).all(axis=1)]
    if len(there) < 2:
        return found
    differences = np.nanmean(there, axis=1)
    if all(np.isin(each[~np.isnan(each)], (0.0, 1.0)).all() for each in (base, trained)):
        low, high = _agresti_min(differences)
    elif len(there) < _FEW:
        reach = float(stdtrit(len(there) - 1, (1 + CONFIDENCE) / 2) * differences.std(ddof=1) / np.sqrt(len(there)))
        low, high = found.value - reach, found.value + reach
    else:
        return found
    return replace(found, low=min(found.low, low), high=max(found.high, high))


def _agresti_min(differences: NDArray[np.float64]) -> tuple[float, float]:
    """Of the differences of P prompts `(P,)` in [-1, 1]; two of the four halves are a difference of 1 and of -1, the others none."""
    from scipy.special import stdtrit

    count = len(differences) + 2
    mean = differences.sum() / count
    variance = (np.square(differences).sum() + 1) / count - mean**2
    reach = float(stdtrit(len(differences) - 1, (1 + CONFIDENCE) / 2) * np.sqrt(variance / count))
    return max(-1.0, float(mean) - reach), min(1.0, float(mean) + reach)


def paired_p_value(base: ArrayLike, trained: ArrayLike) -> float:
    """Two-sided p-value of equal rates for 0/1 values `(P, K)` of two models on the same prompts and seeds.

    Were the models alike, swapping them on any prompt would change nothing: the sign of each prompt's difference is a fair
    coin. The chance of a total difference as large is computed exactly. One picture per prompt is McNemar's exact test; with
    more, whole prompts are swapped, because a model that is worse on a prompt is worse on all its pictures, and counting
    those as independent finds differences that are not there. NaN when no pair is measured.
    """
    base, trained = (zeros_and_ones(by_prompt(values)) for values in (base, trained))
    if base.shape != trained.shape:
        raise ValueError(f"a paired test needs the same prompts and seeds for both models, got {base.shape} and {trained.shape}")
    if np.isnan(trained - base).all():
        return np.nan
    differences = np.nansum(trained - base, axis=1).astype(int)  # (P,)
    total = int(abs(differences).sum())
    chance = np.zeros(2 * total + 1)  # of each total difference, from -total to total
    chance[total] = 1
    for size in abs(differences[differences != 0]):
        chance = (np.roll(chance, size) + np.roll(chance, -size)) / 2
    extreme = abs(np.arange(-total, total + 1)) >= abs(differences.sum())
    return min(1.0, float(chance[extreme].sum()))


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """P-values adjusted for their number (Holm 1979): one below .05 holds although so many were looked at. NaN is counted out."""
    p_values = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full(p_values.shape, np.nan)
    order = np.argsort(p_values)[: (~np.isnan(p_values)).sum()]  # NaN sorts last
    adjusted[order] = np.maximum.accumulate(p_values[order] * np.arange(order.size, 0, -1)).clip(max=1)
    return adjusted
