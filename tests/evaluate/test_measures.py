"""Measures of what encoders see, against plain loops."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from safediffusion.errors import UserError
from safediffusion.evaluate import measures
from safediffusion.evaluate.beforehand import check_columns
from safediffusion.evaluate.measures import Seen, retention
from safediffusion.evaluate.rows import Row
from safediffusion.evaluate.task import Frechet, Likeness, Measure, Pictograms, Score
from safediffusion.types import Prompt


def embeddings(prompts: int, samples: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(prompts, samples, 8))
    return vectors / np.linalg.norm(vectors, axis=2, keepdims=True)


def by_hand(image: np.ndarray, base: np.ndarray, neighbours: int) -> np.ndarray:
    prompts, samples, _ = image.shape
    places = [(p, k) for p in range(prompts) for k in range(samples)]

    def near(vectors: np.ndarray, place: tuple[int, int]) -> set[tuple[int, int]]:
        others = [other for other in places if other[0] != place[0]]
        return set(sorted(others, key=lambda other: -vectors[other] @ vectors[place])[:neighbours])

    return np.array([len(near(image, place) & near(base, place)) / neighbours for place in places]).reshape(prompts, samples)


@pytest.mark.parametrize("at_once", [3, 1024])
def test_retention_is_the_share_of_neighbours_that_stay(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(measures, "_AT_ONCE", at_once)
    image, base = embeddings(7, 2, 0), embeddings(7, 2, 1)
    assert retention(image, base, 4) == pytest.approx(by_hand(image, base, 4))
    assert (retention(image, image) == 1).all()


def test_one_prompt_has_no_neighbours() -> None:
    assert np.isnan(retention(embeddings(1, 3, 0), embeddings(1, 3, 1))).all()


def test_a_missing_picture_has_no_neighbours_and_is_nobodys() -> None:
    image, base = embeddings(7, 2, 0), embeddings(7, 2, 1)
    image[2, 1] = np.nan
    found = retention(image, base, 4)
    assert np.isnan(found[2, 1]) and np.isnan(found).sum() == 1
    rest = [p for p in range(7) if p != 2]
    # Without the missing picture alone: its prompt's other one stays among the candidates.
    assert retention(image[rest], base[rest], 4).shape == (6, 2) and (found[rest] <= 1).all()


def seen(groups: str, samples: int, columns: dict) -> Seen:
    rows = tuple(Row(str(place), Prompt("a red cup"), group) for place, group in enumerate(groups))
    return Seen(rows, samples, columns, tuple(range(len(rows))))


@pytest.mark.parametrize("samples", [1, 2, 4])
def test_a_group_has_the_references_of_its_own_rows(samples: int) -> None:
    columns = {"inception": {"embedding": np.arange(6 * samples)[:, None]}, "inception/reference": {"embedding": np.arange(6)[:, None]}}
    found = seen("aabbab", samples, columns).only(("b",))
    assert found.columns["inception/reference"]["embedding"].ravel().tolist() == [2, 3, 5]
    assert len(found.columns["inception"]["embedding"]) == 3 * samples


def test_two_measures_of_one_name_are_refused_before_anything_is_painted() -> None:
    said = {"alignment": "number", "embedding": "vector"}
    columns = {"clip": said, "pick": said, "inception": {"embedding": "vector"}, "pictograms": {"found": "text"}}

    def check(samples: int, against: bool, **measures: Measure) -> None:
        check_columns(SimpleNamespace(name="mine", measures=measures, painting=SimpleNamespace(samples=samples)), columns, against)

    twice = {"clip": Likeness(instrument="clip"), "pick": Likeness(instrument="pick")}
    with pytest.raises(UserError, match="mine: the measure pick gives 'diversity', which another gives as well; take \"diversity\" out of its measures"):
        check(2, False, **twice)
    with pytest.raises(UserError, match="the measure pick gives 'drift'"):
        check(1, True, **twice)
    check(1, False, **twice)  # with one picture of a prompt and no base neither is made
    check(2, True, clip=twice["clip"], pick=Likeness(instrument="pick", measures=("alignment",)))
    with pytest.raises(UserError, match="the measure composition gives 'composition', which another gives as well; give one of them another name"):
        check(1, False, scene=Pictograms(), composition=Score(instrument="clip", label="alignment"))
    with pytest.raises(UserError, match="the measure kid gives 'kid'"):
        check(1, False, fid=Frechet(), kid=Score(instrument="clip", label="alignment"))
