import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.stats import t

from safediffusion.evaluate import statistics
from safediffusion.evaluate.paired import paired_change
from safediffusion.evaluate.statistics import Estimate, mean_over_prompts, rate, significantly_above, significantly_below

SCORES = arrays.arrays(
    np.float64,
    st.tuples(st.integers(1, 12), st.integers(1, 4)),
    elements=st.one_of(st.just(np.nan), st.floats(-1, 1)),
)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # The first three are published by Newcombe (1998), table I; the last is the closed form.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (29, 29, 0.8830, 1.0)],
)
def test_rate_is_the_wilson_interval(successes, n, low, high):
    estimate = rate([1] * successes + [0] * (n - successes))
    assert estimate.value == pytest.approx(successes / n)
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=5e-5)
    assert estimate.n == n


def test_rate_counts_missing_out_and_refuses_scores():
    assert rate([1, 0, np.nan, 1]) == rate([1, 0, 1])
    assert rate(np.array([[True, False], [True, True]])).value == 0.75
    with pytest.raises(ValueError, match="0, 1 or NaN"):
        rate([0.3, 1])


@pytest.mark.parametrize("empty", [[], [np.nan, np.nan]])
def test_nothing_measured_is_nan_not_zero(empty):
    for estimate in (rate(empty), mean_over_prompts(empty, seed=0), paired_change(empty, empty, seed=0)):
        assert estimate.n == 0
        assert np.isnan([estimate.value, estimate.low, estimate.high]).all()
        assert not significantly_below(estimate)
        assert not significantly_above(estimate)


def test_missing_pictures_do_not_move_a_prompt():
    full = mean_over_prompts([[1.0, 1.0], [0.0, 0.0]], seed=0)
    holes = mean_over_prompts([[1.0, np.nan], [0.0, 0.0], [np.nan, np.nan]], seed=0)
    assert full.value == holes.value == 0.5
    assert (full.n, holes.n) == (4, 3)


def test_one_prompt_has_no_interval():
    estimate = mean_over_prompts([[0.2, 0.4]], seed=0)
    assert estimate.value == pytest.approx(0.3)
    assert np.isnan([estimate.low, estimate.high]).all()


@given(SCORES, st.integers(0, 1000))
@settings(max_examples=40)
def test_interval_stays_in_range_and_depends_on_the_seed_alone(values, seed):
    estimate = mean_over_prompts(values, seed)
    assert estimate.n == (~np.isnan(values)).sum()
    np.testing.assert_equal(estimate.as_dict(), mean_over_prompts(values.copy(), seed).as_dict())
    if not np.isnan(estimate.low):
        assert np.nanmin(values) - 1e-9 <= estimate.low <= estimate.high <= np.nanmax(values) + 1e-9


@given(SCORES)
@settings(max_examples=20)
def test_no_change_between_a_model_and_itself(values):
    change = paired_change(values, values, seed=0)
    assert change.n == 0 or (change.value == 0 and not significantly_below(change) and not significantly_above(change))


def test_interval_covers_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        prompt_means = generator.normal(0.5, 0.2, size=(60, 1))
        values = prompt_means + generator.normal(0, 0.1, size=(60, 4))
        estimate = mean_over_prompts(values, seed=trial)
        hits += estimate.low <= 0.5 <= estimate.high
    assert 0.88 <= hits / 200 <= 0.99


@pytest.mark.parametrize("prompts", [8, 20])
def test_intervals_of_few_prompts_are_as_wide_as_students(prompts):
    generator = np.random.default_rng(0)
    samples = generator.normal(0.5, 0.2, size=(40, prompts))
    estimates = [mean_over_prompts(sample, seed) for seed, sample in enumerate(samples)]
    widths = 2 * t.ppf(0.975, prompts - 1) * samples.std(axis=1, ddof=1) / np.sqrt(prompts)
    assert np.mean([estimate.high - estimate.low for estimate in estimates]) == pytest.approx(widths.mean(), rel=0.05)


def test_wilson_covers_the_truth_about_as_often_as_it_says():
    draws = np.random.default_rng(0).random((300, 100)) < 0.1
    hits = sum(estimate.low <= 0.1 <= estimate.high for estimate in map(rate, draws))
    assert 0.90 <= hits / 300 <= 0.99


def test_pictures_of_one_prompt_are_not_independent():
    """Copying every picture four times must not make the interval narrower."""
    values = np.random.default_rng(0).random((50, 1))
    once, copied = mean_over_prompts(values, seed=1), mean_over_prompts(np.repeat(values, 4, axis=1), seed=1)
    assert (once.low, once.high) == pytest.approx((copied.low, copied.high))
    assert copied.n == 4 * once.n


def test_pairing_is_narrower_on_correlated_models():
    generator = np.random.default_rng(0)
    base = generator.normal(0.5, 0.3, size=(80, 1)) + generator.normal(0, 0.05, size=(80, 4))
    trained = base - 0.1 + generator.normal(0, 0.05, size=(80, 4))
    change = paired_change(base, trained, seed=0)
    separate = [mean_over_prompts(values, seed=0) for values in (base, trained)]
    assert change.value == pytest.approx(separate[1].value - separate[0].value)
    assert change.high - change.low < 0.3 * sum(estimate.high - estimate.low for estimate in separate)
    assert significantly_below(change)
    assert significantly_above(paired_change(trained, base, seed=0))


@pytest.mark.parametrize("prompts", [2, 3, 4, 8])
def test_models_that_are_alike_seldom_differ_of_few_prompts(prompts: int) -> None:
    """Of two prompts the percentiles of a bootstrap are the two values: of one sign, a mark, every other time."""
    generator = np.random.default_rng(prompts)
    found = [paired_change(np.zeros((prompts, 1)), generator.normal(size=(prompts, 1)), seed=0) for _ in range(400)]
    assert sum(significantly_below(each) or significantly_above(each) for each in found) / 400 < 0.08
    assert all(each.low <= each.value <= each.high for each in found)


def test_a_pair_with_a_missing_half_is_counted_out():
    change = paired_change([[1.0, 1.0], [1.0, np.nan]], [[0.0, np.nan], [0.0, 0.0]], seed=0)
    assert (change.value, change.n) == (-1.0, 2)


def test_unequal_shapes_are_refused():
    with pytest.raises(ValueError, match="same prompts and seeds"):
        paired_change(np.zeros((3, 2)), np.zeros((3, 1)), seed=0)
    with pytest.raises(ValueError, match="pictures per prompt"):
        mean_over_prompts(np.zeros((2, 2, 2)), seed=0)


def test_blocks_do_not_change_the_resamples(monkeypatch):
    values = np.random.default_rng(0).random((40, 2))
    whole = mean_over_prompts(values, seed=3)
    monkeypatch.setattr(statistics, "INDICES_AT_ONCE", 40 * 7)
    assert mean_over_prompts(values, seed=3) == whole


def test_estimate_survives_json():
    estimate = Estimate(0.5, 0.4, 0.6, 10)
    assert Estimate(**json.loads(json.dumps(estimate.as_dict()))) == estimate


def test_statistics_need_no_torch():
    script = "import sys; import safediffusion.evaluate.statistics; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_few_prompts_that_all_changed_alike_are_no_certainty() -> None:
    """The exact test of 3 prompts that all got worse says .25."""
    lost = paired_change(np.ones((3, 2)), np.zeros((3, 2)), seed=0)
    assert lost.value == -1 and lost.low == -1 and lost.high > 0
    same = paired_change(np.ones((20, 1)), np.ones((20, 1)), seed=0)
    assert same.value == 0 and same.low < -0.05 and same.high > 0.05
    many = paired_change(np.ones((2000, 1)), np.ones((2000, 1)), seed=0)
    assert -0.002 < many.low < 0 < many.high < 0.002
    scores = paired_change(np.full((20, 1), 0.5), np.full((20, 1), 0.75), seed=0)  # no 0/1 values: the bootstrap alone
    assert (scores.low, scores.high) == (0.25, 0.25)


@pytest.mark.parametrize("prompts", [20, 60])
def test_a_loss_of_five_points_is_seldom_excluded_by_chance(prompts: int) -> None:
    generator = np.random.default_rng(0)
    excluded = 0
    for _ in range(300):
        base = generator.random((prompts, 1)) < 0.95
        trained = base & (generator.random((prompts, 1)) >= 0.05 / 0.95)  # 5 of 100 are lost, none are won
        excluded += paired_change(base.astype(float), trained.astype(float), seed=0).low > -0.05
    assert excluded / 300 <= 0.04  # 2.5 % but for chance


def test_a_sum_is_of_all_values_that_are_there() -> None:
    nan = np.nan
    found = statistics.sum_over_prompts([[0.0, 0.0, 0.0], [1.0, nan, nan]], seed=0)
    assert (found.value, found.n) == (1.0, 4)
    even = np.random.default_rng(0).integers(0, 3, size=(40, 4)).astype(float)
    found, mean = statistics.sum_over_prompts(even, seed=0), mean_over_prompts(even, seed=0)
    assert (found.value, found.low, found.high) == pytest.approx((even.sum(), 160 * mean.low, 160 * mean.high))


def test_the_mean_of_groups_of_few_prompts_is_as_uncertain_as_they_are() -> None:
    alone = statistics.mean_over_strata([[0.0], [1.0]], ["a", "b"], seed=0)
    assert alone.value == 0.5 and np.isnan(alone.low) and np.isnan(alone.high)
    generator, hits = np.random.default_rng(0), 0
    for _ in range(200):
        values = generator.standard_normal((12, 1))
        found = statistics.mean_over_strata(values, [name for name in "abc" for _ in range(4)], seed=0)
        hits += found.low <= 0 <= found.high
    assert hits / 200 > 0.91
