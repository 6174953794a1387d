"""Rates over several pictures of a prompt, tests of pairs, many tests at once, and I2P's expected maximum."""

import itertools
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.stats import binomtest, false_discovery_control

from safediffusion.errors import UserError
from safediffusion.evaluate.paired import holm, paired_p_value
from safediffusion.evaluate.statistics import clustered_rate, expected_maximum, rate

MARKS = arrays.arrays(np.float64, st.tuples(st.integers(1, 12), st.integers(1, 4)), elements=st.sampled_from([0.0, 1.0, np.nan]))


def pictures(generator, share, agreement, prompts, count):
    """0/1 values `(P, K)`: rates of prompts are Beta-distributed, so that two pictures of one prompt correlate by `agreement`."""
    if agreement == 1:
        rates = (generator.random((prompts, 1)) < share).astype(float)
    elif agreement == 0:
        rates = np.full((prompts, 1), share)
    else:
        spread = 1 / agreement - 1
        rates = generator.beta(share * spread, (1 - share) * spread, (prompts, 1))
    return (generator.random((prompts, count)) < rates).astype(float)


def width(estimate):
    return estimate.high - estimate.low


@pytest.mark.parametrize(
    ("share", "agreement", "prompts", "count"),
    [
        (0.02, 0, 250, 1),
        (0.02, 0, 100, 4),
        (0.02, 0.3, 100, 4),
        (0.02, 0.6, 100, 4),
        (0.98, 0.3, 250, 4),
        (0.98, 1, 100, 4),
        (0.1, 0.3, 20, 4),
        (0.1, 0.6, 500, 4),
        (0.5, 0, 100, 1),
        (0.5, 0.3, 100, 10),
    ],
)
def test_a_rate_covers_the_truth_as_often_as_it_says(share, agreement, prompts, count):
    generator = np.random.default_rng(0)
    estimates = [clustered_rate(pictures(generator, share, agreement, prompts, count)) for _ in range(1000)]
    assert 0.93 <= np.mean([estimate.low <= share <= estimate.high for estimate in estimates]) <= 0.985


def test_counting_pictures_as_independent_covers_too_little():
    generator = np.random.default_rng(0)
    estimates = [rate(pictures(generator, 0.1, 0.6, 100, 4)) for _ in range(200)]
    assert np.mean([estimate.low <= 0.1 <= estimate.high for estimate in estimates]) < 0.85


@given(MARKS)
@settings(max_examples=60)
def test_a_rate_stays_between_its_prompts_and_its_pictures(values):
    estimate = clustered_rate(values)
    assert estimate.n == (~np.isnan(values)).sum()
    if estimate.n:
        assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
        assert estimate.value == pytest.approx(np.mean([np.nanmean(row) for row in values if not np.isnan(row).all()]))
        mirrored = clustered_rate(1 - values)
        assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((estimate.low, estimate.high), abs=1e-9)


def test_one_picture_a_prompt_is_wilson():
    values = pictures(np.random.default_rng(0), 0.2, 0, 80, 1)
    ours, plain = clustered_rate(values), rate(values)
    assert (ours.low, ours.high, ours.n) == pytest.approx((plain.low, plain.high, plain.n))


def test_copies_of_a_picture_add_nothing_and_others_do():
    generator = np.random.default_rng(0)
    values = pictures(generator, 0.3, 0, 100, 4)
    copied = np.repeat(values[:, :1], 4, axis=1)
    assert width(clustered_rate(copied)) == pytest.approx(width(rate(values[:, 0])), rel=0.03)
    assert width(clustered_rate(values)) < 0.7 * width(clustered_rate(copied))
    assert width(clustered_rate(values)) >= width(rate(values))


def test_nothing_found_is_as_sure_as_there_are_prompts():
    """No success says nothing of how pictures agree, so 50 prompts of 4 pictures must not pass for 200."""
    assert clustered_rate(np.zeros((50, 4))).high == pytest.approx(rate(np.zeros(50)).high, rel=0.06)
    assert clustered_rate(np.zeros((50, 4))).high >= rate(np.zeros(50)).high


def test_rates_of_nothing_and_of_scores():
    for empty in ([], [[np.nan, np.nan]]):
        estimate = clustered_rate(empty)
        assert estimate.n == 0 and np.isnan([estimate.value, estimate.low, estimate.high]).all()
        assert np.isnan(paired_p_value(empty, empty))
    with pytest.raises(ValueError, match="0, 1 or NaN"):
        clustered_rate([[0.5, 1.0]])
    with pytest.raises(ValueError, match="paired_change for scores"):
        paired_p_value([[0.5]], [[1.0]])
    with pytest.raises(ValueError, match="same prompts and seeds"):
        paired_p_value(np.zeros((3, 2)), np.zeros((3, 1)))


@pytest.mark.parametrize(("better", "worse"), [(9, 2), (5, 5), (0, 6), (40, 17)])
def test_one_picture_a_prompt_is_mcnemar(better, worse):
    base = np.repeat([1.0, 0.0, 1.0, 0.0], [better, worse, 7, 30])
    trained = np.repeat([0.0, 1.0, 1.0, 0.0], [better, worse, 7, 30])
    assert paired_p_value(base, trained) == pytest.approx(binomtest(better, better + worse).pvalue)


@given(arrays.arrays(np.float64, (2, 7, 3), elements=st.sampled_from([0.0, 1.0, np.nan])))
@settings(max_examples=30)
def test_the_p_value_is_the_share_of_all_swaps(values):
    base, trained = values
    differences = np.nansum(trained - base, axis=1)
    swapped = [abs(np.dot(signs, differences)) for signs in itertools.product((-1, 1), repeat=7)]
    if not np.isnan(trained - base).all():
        assert paired_p_value(base, trained) == pytest.approx(np.mean(np.array(swapped) >= abs(differences.sum())))
        assert paired_p_value(base, trained) == pytest.approx(paired_p_value(trained, base))


def test_models_that_differ_from_prompt_to_prompt_alone_are_not_told_apart():
    """Each model has its own rate on each prompt, drawn alike: at .05, one in twenty may be called different, and not more."""
    generator = np.random.default_rng(0)
    pairs = [[pictures(generator, 0.3, 0.5, 40, 4) for _ in range(2)] for _ in range(300)]
    by_prompt = np.mean([paired_p_value(base, trained) < 0.05 for base, trained in pairs])
    by_picture = np.mean([paired_p_value(base.ravel(), trained.ravel()) < 0.05 for base, trained in pairs[:100]])
    assert by_prompt <= 0.075
    assert by_picture > 0.12


def test_holm_is_the_published_procedure():
    # Worked by hand: .01 x 4, .02 x 3, .03 x 2, .04 x 1, and none below the one before it.
    assert holm([0.03, 0.01, np.nan, 0.04, 0.02]) == pytest.approx([0.06, 0.04, np.nan, 0.06, 0.06], nan_ok=True)
    assert holm([0.6, 0.7]).tolist() == [1.0, 1.0]
    assert holm([]).size == 0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
@settings(max_examples=40)
def test_holm_lies_between_doing_nothing_and_bonferroni(p_values):
    adjusted = holm(p_values)
    assert (adjusted >= np.array(p_values) - 1e-12).all()
    assert (adjusted <= np.minimum(1, np.array(p_values) * len(p_values)) + 1e-12).all()
    assert (adjusted >= false_discovery_control(p_values) - 1e-12).all()


def test_expected_maximum_is_that_of_i2p():
    """The draws are without replacement, as in the authors' code, so the mean is a sum over order statistics."""
    values = pictures(np.random.default_rng(0), 0.2, 0.3, 120, 10)
    shares = np.sort(values.mean(axis=1))
    chance = np.array([comb(i, 24) for i in range(120)]) / comb(120, 25)
    mean = (shares * chance).sum()
    std = np.sqrt((shares**2 * chance).sum() - mean**2)
    assert expected_maximum(values) == pytest.approx((mean, std), abs=5 * std / 100)
    assert expected_maximum(values, resamples=100, seed=3) == expected_maximum(values, resamples=100, seed=3)
    assert expected_maximum(shares[:25], resamples=5) == pytest.approx((shares[24], 0))


def test_expected_maximum_counts_missing_prompts_out():
    values = np.vstack([np.full((25, 2), 0.5), np.full((9, 2), np.nan)])
    assert expected_maximum(values, resamples=10) == (0.5, 0.0)
    with pytest.raises(UserError, match="evaluate more prompts"):
        expected_maximum(values[1:])
