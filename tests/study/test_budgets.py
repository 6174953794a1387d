"""A sweep of budgets on runs whose answer is known: what was kept, at what price, and what a weighted sum has at equal safety."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from safediffusion.evaluate.statistics import Estimate
from safediffusion.report.pairs import Scores
from safediffusion.report.results import Results
from safediffusion.study.budgets import Kept, _bounds, budgets, document, markdown
from safediffusion.study.front import fronts
from safediffusion.study.outcome import Outcome, Standing
from safediffusion.study.plan import Axes, Entrant, Study, read_study

STUDY = """
budget = {seconds = 1}
seeds = [0, 1]
[base]
model = "pictograms"
[base.reward]
kind = "combined"
parts = [
    {name = "alignment", reward = {kind = "similarity", encoder = "pictograms"}},
    {name = "guard", reward = {kind = "detection"}},
]
[[sweep]]
name = "budget"
key = "constraints.0.budget"
values = [0.2, 0.05]
recipe = {constraints = [{cost = "guard.unsafe_rate", budget = 0.1}]}
[[sweep]]
name = "kl"
key = "constraints.0.budget"
values = [0.1]
recipe = {constraints = [{cost = "kl", budget = 0.1}]}
[[sweep]]
name = "weight"
label = "by weight"
key = "reward.parts.1.weight"
values = [0.1, 0.3, 1.0, 3.0]
"""
PROMPTS = 40
UNSAFE, RIGHT = "unsafe_rate/seen", "composition"


@pytest.fixture
def study(tmp_path: Path) -> Study:
    (tmp_path / "study.toml").write_text(STUDY)
    return read_study(tmp_path / "study.toml")


def outcome(seed: int, unsafe: float, right: float) -> Outcome:
    """A run of which of 40 prompts that share is unsafe, or right."""
    scores = Scores()
    for name, share in ((UNSAFE, unsafe), (RIGHT, right)):
        for place in range(PROMPTS):
            about = {"task": "pictograms", "id": f"{name}{place}", "group": name, "prompt": "", "sample": 0}
            scores.add({**about, name: float(place < PROMPTS * share)}, several=False)
    trained = {UNSAFE: Estimate(unsafe, unsafe - 0.01, unsafe + 0.01, PROMPTS)}
    return Outcome(seed, Results({}, {"base": {}, "trained": trained}, {}, {}), {"trained": scores}, ())


def standing(entrant: Entrant, *places: tuple[float, float]) -> Standing:
    unsafe, right = (sum(values) / len(places) for values in zip(*places, strict=True))
    values = {UNSAFE: Estimate(unsafe, 0, 1, PROMPTS), RIGHT: Estimate(right, 0, 1, PROMPTS)}
    runs = tuple(outcome(seed, *place) for seed, place in enumerate(places))
    return Standing(entrant.name, entrant.label, values, {RIGHT: Estimate(0.02, -0.01, 0.05, PROMPTS)}, runs, entrant)


@pytest.fixture
def found(study: Study) -> Callable[..., list[Kept]]:
    """`found(loose, strict, *weights)`: the budgets of rows that lie there, (unsafe, right) of each seed."""

    def of(*places: tuple[tuple[float, float], ...]) -> list[Kept]:
        loose, strict, kl, *weights = study.entrants
        rows = [standing(entrant, *place) for entrant, place in zip((loose, strict, *weights), places, strict=True)]
        return budgets(study, fronts(study, [*rows, standing(kl, (0.5, 0.5), (0.5, 0.5))]))

    return of


WEIGHTS = (((0.9, 0.9),) * 2, ((0.3, 0.8),) * 2, ((0.1, 0.6),) * 2, ((0.4, 0.1),) * 2)  # the last is beaten by the second


def test_seeds_that_kept_their_budget_are_counted(found: Callable[..., list[Kept]]) -> None:
    loose, strict = found(((0.225, 0.7), (0.25, 0.7)), ((0.0, 0.6), (0.075, 0.6)), *WEIGHTS)
    assert (loose.row.name, loose.budget, loose.within) == ("budget-0.2", 0.2, 1)  # 22.5 % is within 3 points of 20 %, and 25 % is not
    assert (strict.row.name, strict.budget, strict.within) == ("budget-0.05", 0.05, 2)  # far below is kept as well
    assert [each.value for each in loose.reached] == [0.225, 0.25]
    assert loose.change.value == 0.02


def test_a_seed_without_a_result_has_not_kept_its_budget_and_is_named(study: Study, found: Callable[..., list[Kept]]) -> None:
    loose, _ = found(((0.2, 0.7),), ((0.0, 0.6),) * 2, *WEIGHTS)
    assert (loose.within, loose.seeds, loose.reached[1]) == (1, (0, 1), None)
    assert "20.0 % [19.0 to 21.0]; seed 1 has no result | 1 of 2 |" in markdown([loose], study.settings.pareto)
    assert document([loose])[0]["reached"][1] is None


def test_at_equal_safety_stands_what_lies_between_the_neighbours_on_the_front(found: Callable[..., list[Kept]]) -> None:
    loose, strict = found(((0.2, 0.75),) * 2, ((0.05, 0.6),) * 2, *WEIGHTS)
    kl, weighted = loose.beside
    assert (kl.label, kl.between) == ("kl", ())  # a budget of another cost is a series like any other, here not as safe
    assert weighted.between == ("weight-1", "weight-0.3")
    assert weighted.quality == pytest.approx(0.7)
    assert weighted.more.value == pytest.approx(-0.05)
    assert weighted.more.low < -0.05 < weighted.more.high
    nothing = strict.beside[1]
    assert (nothing.between, nothing.more) == ((), None) and math.isnan(nothing.quality)


def test_the_ends_of_a_front_and_a_point_that_is_met(found: Callable[..., list[Kept]]) -> None:
    past, met = found(((0.95, 0.75),) * 2, ((0.3, 0.8),) * 2, *WEIGHTS)
    assert (past.beside[1].between, past.beside[1].quality) == (("weight-0.1",), pytest.approx(0.9))
    assert (met.beside[1].between, met.beside[1].quality) == (("weight-0.3",), pytest.approx(0.8))
    more = met.beside[1].more
    assert (more.value, more.low, more.high) == (0, 0, 0)  # the same pictures in every resample


def test_what_is_written(study: Study, found: Callable[..., list[Kept]]) -> None:
    kept, axes = found(((0.2, 0.75), (0.25, 0.75)), ((0.05, 0.6),) * 2, *WEIGHTS), study.settings.pareto
    text = markdown(kept, axes)
    assert "| budget, 0.2 | 20.0 % | 20.0 % [19.0 to 21.0]; 25.0 % [24.0 to 26.0] | 1 of 2 | +2.0 points [-1.0 to +5.0] |" in text
    assert "| budget, 0.2 | by weight: between weight-1 and weight-0.3 | 72.5 % | -2.5 points [" in text
    assert "| budget, 0.05 | by weight: no point is as safe | – | – |" in text
    first = document(kept)[0]
    assert (first["within"], first["at_equal_safety"][1]["between"]) == (1, ("weight-1", "weight-0.3"))
    assert markdown([], axes) == ""


@pytest.mark.parametrize(
    ("prompts", "axis", "compared"), [("unsafe", "seen", True), ("safe", "seen", False), ("all", "seen", True), ("safe", "benign", True), ("unsafe", "benign", False)]
)
def test_a_budget_is_compared_with_the_rate_of_the_prompts_that_it_is_about(tmp_path: Path, prompts: str, axis: str, compared: bool) -> None:
    (tmp_path / "study.toml").write_text(STUDY.replace('budget = 0.1}]}\n[[sweep]]\nname = "kl"', f'budget = 0.1, prompts = "{prompts}"}}]}}\n[[sweep]]\nname = "kl"'))
    study = read_study(tmp_path / "study.toml")
    assert _bounds(study.entrants[0], "constraints.0.budget", Axes(unsafe=f"unsafe_rate/{axis}")) is compared
