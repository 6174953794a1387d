"""The front and the hypervolume, against counting; and their intervals on pictures whose answer is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from safediffusion.report.pairs import Scores
from safediffusion.report.results import Results
from safediffusion.study import front
from safediffusion.study.outcome import Outcome, Standing
from safediffusion.study.picture import COLOURS
from safediffusion.study.plan import Entrant, Study, read_study

STUDY = """
budget = {seconds = 1}
seeds = [0, 1]
[base]
model = "pictograms"
reward = {kind = "similarity", encoder = "pictograms"}
[[sweep]]
name = "low"
key = "optimizer.lr"
values = [1e-4, 1e-3]
[[sweep]]
name = "high"
key = "optimizer.lr"
values = [1e-2]
"""
unit = st.floats(0, 1)


@given(st.lists(st.tuples(unit, unit), min_size=1, max_size=6))
def test_the_hypervolume_is_the_share_of_the_square_that_is_dominated(points: list[tuple[float, float]]) -> None:
    grid = (np.arange(200) + 0.5) / 200
    cost, gain = np.meshgrid(grid, grid)
    covered = np.zeros_like(cost, dtype=bool)
    for least, most in points:
        covered |= (cost >= least) & (gain <= most)
    assert front.hypervolume(points, (1.0, 0.0)) == pytest.approx(covered.mean(), abs=0.02)


@given(st.lists(st.tuples(unit, unit), min_size=1, max_size=6))
def test_what_is_not_on_the_front_adds_nothing_to_the_hypervolume(points: list[tuple[float, float]]) -> None:
    best = [point for point, on in zip(points, front.on_front(points), strict=True) if on]
    assert best
    assert front.hypervolume(best, (1.0, 0.0)) == pytest.approx(front.hypervolume(points, (1.0, 0.0)))


def test_a_point_that_another_beats_is_not_on_the_front() -> None:
    assert front.on_front([(0.1, 0.5), (0.2, 0.9), (0.2, 0.4), (0.1, 0.5)]).tolist() == [True, True, False, True]
    assert front.hypervolume([(0.1, 0.5), (0.2, 0.9), (2.0, 1.0)], (1.0, 0.0)) == pytest.approx(0.9 * 0.5 + 0.8 * 0.4)


def outcome(seed: int, unsafe: float, right: float) -> Outcome:
    """A run of which of 20 prompts that share is unsafe, or right."""
    scores = Scores()
    for name, share in (("unsafe_rate/seen", unsafe), ("composition", right)):
        for place in range(20):
            about = {"task": "pictograms", "id": f"{name}{place}", "group": name, "prompt": "", "sample": 0}
            scores.add({**about, name: float(place < 20 * share)}, several=False)
    return Outcome(seed, Results({}, {"base": {}, "trained": {}}, {}, {}), {"trained": scores}, ())


def standing(entrant: Entrant, *places: tuple[float, float]) -> Standing:
    from safediffusion.evaluate.statistics import Estimate

    unsafe, right = np.mean(places, axis=0)
    values = {"unsafe_rate/seen": Estimate(unsafe, 0, 1, 20), "composition": Estimate(right, 0, 1, 20)}
    return Standing(entrant.name, entrant.label, values, {}, tuple(outcome(seed, *place) for seed, place in enumerate(places)), entrant)


@pytest.fixture
def study(tmp_path: Path) -> Study:
    (tmp_path / "study.toml").write_text(STUDY)
    return read_study(tmp_path / "study.toml")


def test_series_with_their_fronts_volumes_and_paired_differences(study: Study) -> None:
    one, two, three = study.entrants
    rows = [standing(one, (0.2, 0.8), (0.2, 0.8)), standing(two, (0.5, 0.5), (0.5, 0.5)), standing(three, (0.8, 0.2), (0.8, 0.2))]
    low, high = front.fronts(study, rows)
    assert low.front == (one.name,)
    assert low.volume.value == pytest.approx(0.8 * 0.8)
    assert low.volume.low < 0.64 < low.volume.high
    assert high.volume.value == pytest.approx(0.2 * 0.2)
    difference = low.less(high)
    assert difference.value == pytest.approx(0.6)
    assert 0 < difference.low < 0.6 < difference.high
    itself = low.less(low)
    assert (itself.value, itself.low, itself.high) == (0, 0, 0)  # the same prompts and seeds in every draw


def test_seeds_that_scatter_widen_the_interval(study: Study) -> None:
    one = study.entrants[0]
    (steady,), (scattered,) = (front.fronts(study, [standing(one, *places)]) for places in (((0.4, 0.6), (0.4, 0.6)), ((0.1, 0.9), (0.7, 0.3))))
    assert scattered.volume.high - scattered.volume.low > 1.5 * (steady.volume.high - steady.volume.low)


@pytest.mark.parametrize(("seeds", "quantile"), [((0.49, 0.51), 12.7062), ((0.49, 0.5, 0.51), 4.3027)])
def test_seeds_alone_have_students_interval(study: Study, seeds: tuple[float, ...], quantile: float) -> None:
    """Of prompts that all score alike. With three the bootstrap of means has ten values, and its ends lie within a tenth of Student's."""
    outcomes = []
    for seed, value in enumerate(seeds):
        scores = Scores()
        for place in range(20):
            scores.add({"task": "pictograms", "id": str(place), "group": "", "prompt": "", "sample": 0, "unsafe_rate/seen": 0.0, "composition": value}, several=False)
        outcomes.append(Outcome(seed, Results({}, {"base": {}, "trained": {}}, {}, {}), {"trained": scores}, ()))
    row = replace(standing(study.entrants[0], *[(0.0, 0.5)] * len(seeds)), outcomes=tuple(outcomes))
    (series,) = front.fronts(study, [row])
    half = quantile * np.std(seeds, ddof=1) / np.sqrt(len(seeds))
    assert series.volume.low == pytest.approx(0.5 - half, abs=0.1 * half)
    assert series.volume.high == pytest.approx(0.5 + half, abs=0.1 * half)


def test_what_is_written_of_a_sweep(study: Study) -> None:
    rows = [standing(entrant, (0.2, 0.8), (0.3, 0.7)) for entrant in study.entrants]
    series = front.fronts(study, rows)
    axes = study.settings.pareto
    told = front.document(series, axes)
    assert [each["name"] for each in told["series"]] == ["low", "high"]
    assert told["differences"][0]["of"] == "low" and told["differences"][0]["value"] == 0
    assert "low less high: 0.000 [0.000 to 0.000]" in front.markdown(series, axes)
    without = "An interval without width says that all pictures behind it agree"
    assert without in front.markdown(series, axes) and without not in front.markdown(series[:1], axes)
    drawn = front.picture(series, rows, axes, "a sweep")
    assert drawn.startswith(b"\x89PNG") and drawn == front.picture(series, rows, axes, "a sweep")  # names are moved apart the same way again
    many = [replace(series[0], name=str(number)) for number in range(len(COLOURS))]
    assert front.picture([*many, series[1]], rows, axes, "") != front.picture(many, rows, axes, "")  # a series past the last colour is drawn too


def test_the_interval_covers_the_truth_where_few_seeds_scatter(study: Study) -> None:
    """Composition = 0.5 + seed effect + prompt effect + noise; 3 seeds x 20 prompts: a plain bootstrap of seeds would cover 8 of 10."""
    generator, hits, rounds = np.random.default_rng(0), 0, 60
    for _ in range(rounds):
        values = 0.5 + 0.1 * generator.standard_normal((3, 1)) + 0.1 * generator.standard_normal((1, 20)) + 0.05 * generator.standard_normal((3, 20))
        outcomes = []
        for seed, row in enumerate(values):
            scores = Scores()
            for place, value in enumerate(row):
                about = {"task": "pictograms", "id": str(place), "group": "seen", "prompt": "", "sample": 0}
                scores.add({**about, "unsafe_rate/seen": 0.0, "composition": float(value)}, several=False)
            outcomes.append(Outcome(seed, Results({}, {"base": {}, "trained": {}}, {}, {}), {"trained": scores}, ()))
        row = standing(study.entrants[0], (0.0, float(values.mean())))
        (series,) = front.fronts(study, [replace(row, outcomes=tuple(outcomes))])
        hits += series.volume.low <= 0.5 <= series.volume.high
    assert hits / rounds > 0.92
