"""What runs came to: intervals over seeds and prompts, gains of the reward, and what counts as hacked."""

from __future__ import annotations

import math

import numpy as np
import pytest

from safediffusion.evaluate.statistics import Estimate, mean_over_prompts, over_repeats
from safediffusion.report.results import Results
from safediffusion.study.outcome import Outcome, Standing
from safediffusion.study.table import hacking


def test_one_repeat_has_the_interval_of_its_prompts() -> None:
    alone = Estimate(0.3, 0.2, 0.45, 40)
    found = over_repeats([alone], alone)
    assert (found.value, found.n) == (0.3, 40)
    assert (found.low, found.high) == pytest.approx((0.2, 0.45))


def test_repeats_that_agree_leave_the_interval_as_it_is_and_those_that_scatter_widen_it() -> None:
    within = Estimate(0.3, 0.2, 0.45, 80)
    same = over_repeats([Estimate(0.3, 0, 1, 40)] * 2, within)
    assert (same.low, same.high, same.n) == (pytest.approx(0.2), pytest.approx(0.45), 80)
    wide = over_repeats([Estimate(0.2, 0, 1, 40), Estimate(0.4, 0, 1, 40)], within)
    reach = 12.706 * np.std([0.2, 0.4], ddof=1) / math.sqrt(2)  # Student's quantile at one degree of freedom
    assert wide.high - 0.3 == pytest.approx(math.hypot(0.15, reach), rel=1e-3)
    assert 0.3 - wide.low == pytest.approx(math.hypot(0.1, reach), rel=1e-3)


def test_what_was_not_measured_in_a_repeat_is_left_out() -> None:
    nothing = Estimate(math.nan, math.nan, math.nan, 0)
    assert over_repeats([Estimate(0.5, 0, 1, 9), nothing], Estimate(0.5, 0.4, 0.6, 9)).value == 0.5
    assert over_repeats([nothing], nothing).n == 0


def test_the_interval_covers_the_truth_where_seeds_and_prompts_both_scatter() -> None:
    """A crossed world: score = 0.5 + seed effect + prompt effect + noise; 5 seeds x 30 prompts x 2 pictures."""
    generator, hits, rounds = np.random.default_rng(0), 0, 150
    for _ in range(rounds):
        values = 0.5 + 0.1 * generator.standard_normal((5, 1, 1)) + 0.2 * generator.standard_normal((1, 30, 1)) + 0.1 * generator.standard_normal((5, 30, 2))
        repeats = [Estimate(float(each.mean()), 0, 1, 60) for each in values]
        within = mean_over_prompts(values.transpose(1, 0, 2).reshape(30, -1), seed=0)
        found = over_repeats(repeats, within)
        hits += found.low <= 0.5 <= found.high
    assert hits / rounds > 0.92


def records(rewards: list[float], sound: bool = True) -> tuple[dict, ...]:
    """The log of a run: an iteration takes 2 processor seconds, 3 on the wall and 10 forwards, a probe 5 and 9 seconds after every second one."""
    clock, wall, lines = 1.0, 2.0, []
    for iteration, reward in enumerate(rewards, 1):
        clock, wall = clock + 2.0, wall + 3.0
        lines.append({"kind": "train", "iteration": iteration, "cpu_seconds": clock, "seconds": wall, "forwards": 10.0 * iteration, "reward/total": reward})
        if iteration % 2 == 0:
            clock, wall = clock + 5.0, wall + 9.0
            lines.append({"kind": "probe", "iteration": iteration, "cpu_seconds": clock, "seconds": wall, "forwards": 10.0 * iteration, "sound": sound})
    return tuple(lines)


def run(rewards: list[float], sound: bool = True) -> Outcome:
    return Outcome(0, Results({}, {"base": {}, "trained": {}}, {}, {}), {}, records(rewards, sound))


def test_what_was_spent_leaves_the_probes_out() -> None:
    found = run([0.0] * 4)
    # The first iteration has what came before it: building is not in the log's clock.
    assert found.spent == {"iterations": 4, "forwards": 40.0, "cpu_seconds": 1.0 + 4 * 2.0, "seconds": 2.0 + 4 * 3.0}
    assert [(probe["cpu_seconds"], probe["seconds"]) for probe in found.probes] == [(5.0, 8.0), (9.0, 14.0)]


def test_the_gain_is_in_standard_deviations_of_an_iteration() -> None:
    assert run(RISING).gain == pytest.approx(0.5 / np.std([0.0, 0.1, 0.2, 0.3, 0.4], ddof=1))
    steady = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
    assert run([*steady, *[9.0] * 18, *(1 + value for value in steady)]).gain == pytest.approx(1.0 / np.std(steady, ddof=1))  # a fifth of 30
    assert math.isnan(run(RISING[:9]).gain)


def test_a_reward_that_does_not_move_seldom_gains() -> None:
    generator = np.random.default_rng(0)
    for iterations in (10, 14, 25, 50):
        gains = [run(generator.standard_normal(iterations).tolist()).gain for _ in range(400)]
        assert np.mean(np.array(gains) >= 1) < 0.1


def test_what_was_not_trained_has_spent_nothing_and_hacked_no_reward() -> None:
    untrained = Outcome(0, Results({}, {"base": {}, "trained": {}}, {}, {}), {}, ())
    assert untrained.spent == {"iterations": 0, "forwards": 0.0, "cpu_seconds": 0.0, "seconds": 0.0}
    row = Standing("a", "a", {}, {"composition": FELL}, (untrained,))
    assert (row.hacked, row.fallen, hacking(row)) == (None, ["composition"], "–")


RISING, FLAT = [place / 10 for place in range(10)], [0.2, 0.0, 0.0, 0.0, 0.0] * 2
FELL, HELD = Estimate(-0.1, -0.15, -0.05, 100), Estimate(-0.01, -0.05, 0.03, 100)


@pytest.mark.parametrize(
    ("rewards", "composition", "sound", "hacked", "said"),
    [
        (RISING, HELD, True, False, "+3.2 sd"),
        (RISING, FELL, True, True, "+3.2 sd; composition -10.0 points; hacked"),
        (RISING, HELD, False, True, "+3.2 sd; ended below the base in 1 of 1; hacked"),
        (FLAT, FELL, True, False, "+0.0 sd; composition -10.0 points"),
        (RISING[:3], FELL, True, None, "–; composition -10.0 points"),
    ],
)
def test_a_reward_is_hacked_where_it_rises_and_what_it_does_not_see_falls(
    rewards: list[float], composition: Estimate, sound: bool, hacked: bool | None, said: str
) -> None:
    row = Standing("a", "a", {}, {"composition": composition}, (run(rewards, sound),))
    assert row.hacked is hacked
    assert hacking(row) == said
