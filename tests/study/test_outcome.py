"""What runs came to: intervals over seeds and prompts, gains of the reward, and what counts as hacked."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from safediffusion.errors import UserError
from safediffusion.evaluate.statistics import Estimate, mean_over_prompts, over_repeats
from safediffusion.report.metric import effect
from safediffusion.report.pairs import Scores
from safediffusion.report.results import Results
from safediffusion.study.outcome import Outcome, Standing, meaning
from safediffusion.study.table import columns, hacking, warnings


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


def test_a_tasks_own_rate_is_a_rate_in_a_study_too() -> None:
    row = Standing("a", "a", {"nudity": Estimate(1.0, 0.9, 1.0, 40)}, {"nudity": Estimate(-0.5, -0.6, -0.4, 40)}, kinds={"nudity": "rate"})
    (of,) = columns([Standing("base", "base", {}), row])
    assert (of.share, of.arrow) == (True, "↓")
    assert of == meaning([row], "nudity")
    assert effect(of, row.changes["nudity"]) == "better"


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


def measured(seed: int, kind: str, name: str, estimate: Estimate, values: list[float]) -> Outcome:
    """A run whose one measure, of that kind, gave each of so many pictures a value, and the whole an estimate."""
    scores = {"base": Scores(), "trained": Scores()}
    for place, value in enumerate(values):
        for model, shift in (("base", 1.0), ("trained", 0.0)):
            scores[model].add({"task": "own", "id": str(place), "group": "all", "prompt": "", "sample": 0, name: value + shift}, several=False)
    protocol = {"id": "own@1", "tasks": {"own": {"measures": {name: {"kind": kind}}}}}
    whole = {} if kind == "frechet" else scores
    return Outcome(seed, Results(protocol, {"base": {name: estimate}, "trained": {name: estimate}}, {name: estimate}, {}), whole, ())


def test_what_is_no_mean_of_pictures_has_the_interval_of_its_evaluations() -> None:
    from safediffusion.study.outcome import _change, _value

    counted = [measured(seed, "count", "labels", Estimate(value, value - 26, value + 26, 300), [1.0] * 300) for seed, value in enumerate((330.0, 340.0))]
    of = counted[0].results.metric("labels")
    alone = _value(of, counted[:1])
    assert (alone.value, alone.low, alone.high) == (330, 304, 356)
    both = _value(of, counted)
    reach = 12.706 * np.std([330, 340], ddof=1) / math.sqrt(2)
    assert both.high - 335 == pytest.approx(math.hypot(26, reach), rel=1e-3)
    assert _change(of, counted[:1]).low == 304


def test_a_distance_between_pictures_is_never_below_zero() -> None:
    """Student's of two seeds reaches far."""
    from safediffusion.study.outcome import _value

    runs = [measured(seed, "likeness", "drift", Estimate(value, value, value, 300), [value] * 300) for seed, value in enumerate((0.01, 0.03))]
    found = _value(runs[0].results.metric("drift"), runs)
    assert (found.value, found.low) == (pytest.approx(0.02), 0.0) and found.high > 0.14


def test_a_distance_of_a_set_has_no_interval_from_one_seed_and_that_of_the_scatter_from_several() -> None:
    from safediffusion.study.outcome import _value

    nan = math.nan
    runs = [measured(seed, "frechet", "fid", Estimate(value, nan, nan, 500), []) for seed, value in enumerate((10.0, 12.0))]
    of = runs[0].results.metric("fid")
    alone = _value(of, runs[:1])
    assert alone.value == 10 and math.isnan(alone.low) and math.isnan(alone.high)
    both = _value(of, runs)
    assert both.value == 11
    assert both.high - 11 == 11 - both.low == pytest.approx(12.706, rel=1e-3)


def test_runs_that_were_not_measured_as_the_base_share_no_table_with_it(tmp_path: Path) -> None:
    from safediffusion.study.outcome import _check_alike

    base = Results({"id": "a@1"}, {"model": {}}, {}, {"models": {"model": {"sha256": {"unet": "1"}}}})
    run_of = {"models": {"base": {"sha256": {"unet": "1"}}}}
    _check_alike(base, Outcome(0, Results({"id": "a@1"}, {"base": {}, "trained": {}}, {}, run_of), {}, ()), tmp_path / "a-0")
    with pytest.raises(UserError, match="numbers of different protocols share no table: the tasks were a@1 and are a@2; delete the results.json"):
        _check_alike(base, Outcome(0, Results({"id": "a@2"}, {"base": {}, "trained": {}}, {}, run_of), {}, ()), tmp_path / "a-0")
    with pytest.raises(UserError, match="the weights of the base are others"):
        _check_alike(base, Outcome(0, Results({"id": "a@1"}, {"base": {}, "trained": {}}, {}, {"models": {"base": {"sha256": {"unet": "2"}}}}), {}, ()), tmp_path / "a-0")


def test_warnings_of_evaluations_are_said_once_with_their_rows() -> None:
    told = Outcome(0, Results({}, {"base": {}, "trained": {}}, {}, {}, ("It grades here as well.",)), {}, ())
    rows = [Standing(name, f"row {name}", {}, {}, (told, told)) for name in ("a", "b")]
    assert warnings(rows) == ["row a, row b: It grades here as well."]
