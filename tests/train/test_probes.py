"""The guards: what counts as fallen, which checkpoint is best, and what is said."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safediffusion.evaluate.statistics import Estimate
from safediffusion.train.probes import ProbeSettings, better, due, judge, marks, record

NOT_MEASURED = Estimate(math.nan, math.nan, math.nan, 0)


def value(at: float) -> Estimate:
    return Estimate(at, at - 0.05, at + 0.05, 80)


UNSAFE = {"unsafe_rate/seen": value(0.4), "unsafe_rate/implicit": value(0.2), "unsafe_rate/benign": value(0.9)}
NOW = UNSAFE | {"composition": value(0.6), "alignment": value(0.3), "diversity": value(0.2)}
EVEN = {name: Estimate(0.0, -0.1, 0.1, 80) for name in NOW}
FALLEN = Estimate(-0.2, -0.3, -0.1, 80)


@given(steps=st.integers(1, 400), count=st.integers(1, 20))
def test_a_run_has_as_many_probes_as_were_asked_for_and_the_last_at_its_end(steps: int, count: int) -> None:
    found = [step for step in range(1, steps + 1) if due(ProbeSettings(count=count), step, steps)]
    assert len(found) == min(count, steps)
    assert found[-1] == steps
    gaps = [after - before for before, after in zip([0, *found], found, strict=False)]
    assert max(gaps) - min(gaps) <= 1


def test_every_counts_iterations() -> None:
    assert [step for step in range(1, 10) if due(ProbeSettings(every=4), step, 9)] == [4, 8]
    assert not any(due(ProbeSettings(every=0), step, 9) for step in range(1, 10))


def test_the_unsafe_rate_is_the_mean_over_the_unsafe_sets() -> None:
    verdict = judge(NOW, EVEN)
    assert verdict.unsafe_rate == pytest.approx(0.3)
    assert verdict.sound
    assert verdict.alarms == ()
    assert math.isnan(judge({"composition": value(0.5)}, {}).unsafe_rate)


@pytest.mark.parametrize(("name", "sound"), [("composition", False), ("diversity", False), ("alignment", True), ("unsafe_rate/seen", True)])
def test_what_fell_significantly(name: str, sound: bool) -> None:
    verdict = judge(NOW, EVEN | {name: FALLEN})
    assert verdict.sound is sound
    assert verdict.alarms == (() if name.startswith("unsafe") else (f"{name} fell by 0.200 (95 % interval 0.100 to 0.300)",))


@pytest.mark.parametrize("change", [Estimate(-0.2, -0.4, 0.0, 80), Estimate(-0.2, math.nan, math.nan, 1), NOT_MEASURED, Estimate(0.2, 0.1, 0.3, 80)])
def test_what_is_no_significant_fall(change: Estimate) -> None:
    assert judge(NOW, EVEN | {"composition": change}) == judge(NOW, EVEN)


def test_collapse_is_called_by_its_name() -> None:
    lost_half = EVEN | {"diversity": Estimate(-0.3, -0.4, -0.2, 80)}
    assert judge(NOW, lost_half).alarms[-1] == "pictures of one prompt look alike: the model is collapsing"
    assert len(judge(NOW, EVEN | {"diversity": Estimate(-0.1, -0.15, -0.05, 80)}).alarms) == 1


def line(unsafe: float, composition: float = 0.5, sound: bool = True, **more: float) -> dict:
    return {"unsafe_rate": unsafe, "composition": composition, "sound": sound, **more}


@pytest.mark.parametrize(
    ("candidate", "best", "expected"),
    [
        (line(0.5), None, True),
        (line(0.0, sound=False), None, False),
        (line(0.0, sound=False), line(0.9), False),
        (line(0.4), line(0.5), True),
        (line(0.4, 0.1), line(0.5, 0.9), True),  # composition above the guard is no currency for danger
        (line(0.5), line(0.4), False),
        (line(0.4, 0.6), line(0.4, 0.5), True),
        (line(0.4, 0.5), line(0.4, 0.5), True),  # the later one
        (line(0.03, 0.5, **{"unsafe_rate/seen": 0.03, "unsafe_rate/seen/low": 0.01, "unsafe_rate/seen/high": 0.07}), line(0.02, 0.4), True),  # within 0.015
        (line(0.04, 0.5, **{"unsafe_rate/seen": 0.04, "unsafe_rate/seen/low": 0.02, "unsafe_rate/seen/high": 0.08}), line(0.02, 0.4), False),
        (line(0.4, 0.48, **{"composition/low": 0.4, "composition/high": 0.56}), line(0.4, 0.5), True),  # within 0.04
        (line(0.4, 0.45, **{"composition/low": 0.37, "composition/high": 0.53}), line(0.4, 0.5), False),
        (line(math.nan, alignment=0.3), line(math.nan, alignment=0.2), True),
        (line(math.nan, alignment=0.1), line(math.nan, alignment=0.2), False),
    ],
)
def test_the_rule_of_the_best_checkpoint(candidate: dict, best: dict | None, expected: bool) -> None:
    assert better(candidate, best) is expected


def test_many_small_steps_down_do_not_add_up() -> None:
    """Each probe is within chance of the one before it, in both measures; the tenth is not within chance of the first."""
    best: dict | None = None
    taken = []
    for step in range(10):
        unsafe, composition = 0.01 + 0.004 * step, 0.9 - 0.01 * step
        exact = {"unsafe_rate/seen": unsafe, "unsafe_rate/seen/low": unsafe - 0.02, "unsafe_rate/seen/high": unsafe + 0.02}
        probe = line(unsafe, composition, **exact, **{"composition/low": composition - 0.05, "composition/high": composition + 0.05})
        if better(probe, best):
            best = probe | marks(probe, best)
            taken.append(step)
    assert taken == [0, 1, 2]  # 0.010 and 0.026 from the first are a standard error
    safer = line(0.0, 0.7, **{"unsafe_rate/seen": 0.0, "unsafe_rate/seen/low": 0.0, "unsafe_rate/seen/high": 0.01})
    assert better(safer, best)
    assert marks(safer, best) == {"least_unsafe": 0.0, "most_composition": 0.7}  # a clearly safer one is compared by itself


def test_under_constraints_nothing_but_the_latest_is_a_mark() -> None:
    """Or a run whose budget is 30 % would be told that one of 0 % was safer by chance."""
    best: dict | None = None
    for unsafe in (0.9, 0.0, 0.3):
        probe = line(unsafe, 0.9)
        assert better(probe, best, latest=True)
        best = probe | marks(probe, best, latest=True)
    assert best["least_unsafe"] == best["unsafe_rate"] == 0.3


def test_a_record_holds_values_intervals_and_changes() -> None:
    written = record(NOW, EVEN | {"composition": FALLEN}, judge(NOW, EVEN | {"composition": FALLEN}))
    assert written["kind"] == "probe"
    assert (written["composition"], written["composition/change"]) == (0.6, -0.2)
    assert (written["composition/low"], written["composition/high"]) == (pytest.approx(0.55), pytest.approx(0.65))
    assert written["sound"] is False
    assert written["alarms"] == ["composition fell by 0.200 (95 % interval 0.100 to 0.300)"]


def test_under_constraints_the_newest_sound_checkpoint_is_the_best() -> None:
    assert better(line(0.2, 0.4), line(0.0, 0.9), latest=True)
    assert not better(line(0.0, sound=False), line(0.2), latest=True)
