"""How far the pictures of two models lie apart: FID (arXiv 1706.08500) and KID (1801.01401) over features `(N, D)`.

Both depend on the protocol: features, resize, reference and, for FID, how many pictures there are. With few pictures FID
is too high (by about c / N, arXiv 1911.07023), so two FIDs compare at equal N only; KID has no such bias.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from safediffusion.errors import UserError
from safediffusion.evaluate.statistics import CONFIDENCE, Estimate
from safediffusion.files import explained, write_bytes

Array = NDArray[np.float64]
# 30,000 x 2048 features take half a gigabyte in float64; this many rows of them take 16 MiB.
ROWS_AT_ONCE = 1024


@dataclass(frozen=True, eq=False)
class Moments:
    """What FID knows of a set of pictures: `mean` `(D,)` and `covariance` `(D, D)` of their features, float64, over N - 1.

    `count` is None for a reference file that does not say from how many pictures it was made.
    """

    count: int | None
    mean: Array
    covariance: Array


def moments(features: ArrayLike) -> Moments:
    """Mean and covariance of features `(N, D)`. Raises UserError for values that are not finite, ValueError for another shape."""
    features = np.asarray(features)
    if features.ndim != 2 or not features.size:
        raise ValueError(f"features must be (pictures, dimensions), got shape {features.shape}")
    return merged(_block(features[start : start + ROWS_AT_ONCE]) for start in range(0, len(features), ROWS_AT_ONCE))


def merged(parts: Iterable[Moments]) -> Moments:
    """The moments of all pictures, given those of disjoint parts; one part is held in memory at a time (Chan et al. 1983)."""
    parts = iter(parts)
    whole = next(parts)
    for part in parts:
        whole = _joined(whole, part, 1)
    return whole


def save_moments(path: Path, moments: Moments) -> None:
    """Write the usual reference file: an .npz of `mu` and `sigma`, and `count` where it is known."""
    buffer = io.BytesIO()
    counted = {} if moments.count is None else {"count": np.int64(moments.count)}
    np.savez(buffer, mu=moments.mean, sigma=moments.covariance, **counted)
    write_bytes(path, buffer.getvalue())


def load_moments(path: Path) -> Moments:
    """Read a reference file, ours or another's. Raises UserError for what is none; nothing is unpickled."""
    try:
        with explained(path), np.load(path, allow_pickle=False) as file:
            mean, covariance = file["mu"].astype(np.float64), file["sigma"].astype(np.float64)
            count = int(file["count"]) if "count" in file else None
    except (ValueError, KeyError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no FID reference: it must be an .npz file with the arrays mu and sigma") from error
    if mean.ndim != 1 or covariance.shape != (mean.size, mean.size) or not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(f"{path} is no FID reference: mu is {mean.shape} and sigma {covariance.shape}, but finite (D,) and (D, D) were expected")
    return Moments(count, mean, covariance)


def frechet(a: Moments, b: Moments) -> float:
    """Squared distance of two Gaussians, |m - n|^2 + tr(A + B - 2 (A B)^(1/2)) (arXiv 1706.08500, eq. 6)."""
    for side in (a, b):
        if side.count is not None and side.count < 2:
            raise UserError("a FID needs at least 2 pictures on either side (thousands, to mean something)")
    if a.mean.size != b.mean.size:
        raise UserError(f"features of {a.mean.size} and of {b.mean.size} dimensions do not compare; take a reference made with the same network")
    return _distance(a, b, _root(b.covariance))


def fid(features_a: ArrayLike, features_b: ArrayLike) -> float:
    """The Fréchet distance of features `(N, D)` and `(M, D)`; `frechet` for moments, such as those of a reference file."""
    return frechet(moments(features_a), moments(features_b))


def fid_interval(features: ArrayLike, reference: Moments, of_prompt: ArrayLike | None = None, groups: int = 20) -> Estimate:
    """FID of features `(N, D)` against a fixed reference, with the 95 % interval of a jackknife over groups of prompts.

    `of_prompt` (N,) counts the prompts of the rows from 0; left out, each is of its own. A bootstrap would not do: it repeats pictures, which raises FID
    as fewer pictures do, and with as few pictures as dimensions its interval misses the value itself; there this one is too
    wide instead. It is about the mean FID of N such pictures, so the bias at small N stays in it. Raises UserError for one prompt.
    """
    features = np.asarray(features)
    of_group, groups = _grouped(len(features), of_prompt, groups)

    def part(group: int) -> Moments:  # made anew each time: twenty covariances of 2048 x 2048 would take 640 MiB
        return moments(features[of_group == group])

    whole = merged(part(group) for group in range(groups))
    value = frechet(whole, reference)
    root = _root(reference.covariance)
    without = np.array([_distance(_joined(whole, part(group), -1), reference, root) for group in range(groups)])
    reach = _jackknifed(without)
    return Estimate(value, max(0.0, value - reach), value + reach, len(features))


def _grouped(count: int, of_prompt: ArrayLike | None, groups: int) -> tuple[NDArray[np.int64], int]:
    """A group for each of `count` rows, all of a prompt in one, and how many there are. Raises UserError for one prompt."""
    prompts, place = np.unique(np.arange(count) if of_prompt is None else np.asarray(of_prompt), return_inverse=True)
    groups = min(groups, len(prompts))
    if groups < 2:
        raise UserError("the interval of a FID needs pictures of at least 2 prompts")
    return place % groups, groups


def _jackknifed(without: Array) -> float:
    """Half the 95 % interval, from the values without each group."""
    from scipy.stats import t

    return math.sqrt((len(without) - 1) * without.var()) * float(t.ppf((1 + CONFIDENCE) / 2, len(without) - 1))


def kid(features_a: ArrayLike, features_b: ArrayLike, subsets: int = 100, subset_size: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Mean and standard deviation over subsets of the unbiased squared MMD with the kernel (x.y / D + 1)^3; slightly below 0 is no fault.

    The deviation says how much `subset_size` pictures scatter; it is no standard error of the mean, whose subsets overlap: `kid_reach` has that.
    Raises UserError for fewer pictures than `subset_size`. At one seed the subsets are torch-fidelity's.
    """
    features_a, features_b = np.asarray(features_a), np.asarray(features_b)
    fewest = min(len(features_a), len(features_b))
    if fewest < subset_size:
        raise UserError(f"KID over subsets of {subset_size} pictures needs as many on either side, got {fewest}; lower the subset size or make more pictures")
    if subset_size < 2:
        raise UserError("the subsets of KID need at least 2 pictures")
    generator = np.random.RandomState(seed)  # the old generator: its stream never changes, and torch-fidelity draws from it
    values = []
    for _ in range(subsets):
        a, b = (_checked(rows[generator.choice(len(rows), subset_size, replace=False)]) for rows in (features_a, features_b))
        values.append(_mmd(a, b))
    return float(np.mean(values)), float(np.std(values))


def kid_reach(features: ArrayLike, reference: ArrayLike, of_prompt: ArrayLike | None = None, groups: int = 20) -> float:
    """Half the 95 % interval of a KID of features `(N, D)` against fixed reference features, by a jackknife over groups of prompts as in `fid_interval`.

    Of the squared MMD over all pictures: leaving a group out takes its rows and columns off the sums of the kernel, which are made once.
    """
    features, reference = _checked(features), _checked(reference)
    of_group, groups = _grouped(len(features), of_prompt, groups)
    member = np.eye(groups)[of_group]  # (N, G)
    own, other, alone = np.zeros((groups, groups)), np.zeros(groups), np.zeros(groups)
    for start in range(0, len(features), ROWS_AT_ONCE):
        rows, mine = features[start : start + ROWS_AT_ONCE], member[start : start + ROWS_AT_ONCE]
        own += mine.T @ _kernel(rows, features) @ member
        other += mine.T @ _kernel(rows, reference).mean(axis=1)
        alone += mine.T @ (np.square(rows).sum(axis=1) / rows.shape[1] + 1) ** 3  # of a picture with itself
    counts = member.sum(axis=0)
    left = len(features) - counts
    within = own.sum() - alone.sum() - own.sum(axis=0) - own.sum(axis=1) + own.diagonal() + alone
    return _jackknifed(within / (left * (left - 1)) - 2 * (other.sum() - other) / left)


def _kernel(x: Array, y: Array) -> Array:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _mmd(a: Array, b: Array) -> float:
    """Unbiased: the pairs of a picture with itself are left out (arXiv 1801.01401)."""
    pairs = len(a) * (len(a) - 1)
    within = sum(float(own.sum() - np.trace(own)) for own in (_kernel(a, a), _kernel(b, b)))
    return within / pairs - 2 * float(_kernel(a, b).mean())


def _block(features: ArrayLike) -> Moments:
    rows = _checked(features)
    mean = rows.mean(axis=0)
    centred = rows - mean
    # One picture has no spread: 0 of 0, taken for 0, so that it can be merged.
    return Moments(len(rows), mean, centred.T @ centred / max(1, len(rows) - 1))


def _checked(features: ArrayLike) -> Array:
    rows = np.asarray(features, dtype=np.float64)
    if not np.isfinite(rows).all():
        raise UserError("features hold NaN or infinity; the pictures or the network that made them are broken")
    return rows


def _joined(a: Moments, b: Moments, sign: int) -> Moments:
    """The moments of a and b together (+1), or of a without its part b (-1)."""
    if a.count is None or b.count is None:
        raise ValueError("moments of an unknown number of pictures cannot be merged")
    count = a.count + sign * b.count
    apart = b.mean - a.mean
    mean = a.mean + apart * (sign * b.count / count)
    scatter = (a.count - 1) * a.covariance + sign * (b.count - 1) * b.covariance + np.outer(apart, apart) * (sign * a.count * b.count / count)
    return Moments(count, mean, scatter / max(1, count - 1))


def _root(covariance: Array) -> Array:
    """The symmetric root; rounding leaves eigenvalues a little below 0, which are taken for 0."""
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def _distance(a: Moments, b: Moments, root: Array) -> float:
    """`root` is that of b's covariance. tr (A B)^(1/2) is the sum of the roots of the eigenvalues of B^(1/2) A B^(1/2), which is symmetric."""
    product = root @ a.covariance @ root
    overlap = np.sqrt(np.linalg.eigvalsh((product + product.T) / 2).clip(0)).sum()
    apart = a.mean - b.mean
    return max(0.0, float(apart @ apart + np.trace(a.covariance) + np.trace(b.covariance) - 2 * overlap))
