"""The table of methods is what the code says: nothing in it is listed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args, get_type_hints

import safediffusion
from safediffusion.algorithms.card import Card
from safediffusion.config import read_toml
from safediffusion.methods import HEADS, as_json, cells, markdown, methods
from safediffusion.recipe import Recipe

ROOT = Path(safediffusion.__file__).parent


def test_every_algorithm_of_a_recipe_has_a_row_with_its_cost_paper_and_file() -> None:
    rows = methods()
    assert [row.kind for row in rows] == [each.__pydantic_fields__["kind"].default for each in get_args(get_type_hints(Recipe)["algorithm"])]
    for row in rows:
        assert row.forwards is not None and row.forwards > 10  # ten steps paint an image, and training comes on top
        assert (ROOT / row.card.file).is_file()
        assert f"{row.kind}.py" == Path(row.card.file).name
        assert len(cells(row)) == len(HEADS)
    assert len({row.card.paper for row in rows}) == len(rows)


def test_cards_speak_in_the_terms_of_the_survey() -> None:
    terms = {name: set(get_args(get_args(kind)[0])) for name, kind in get_type_hints(Card).items() if name in ("feedback", "restraint", "safety")}
    for row in methods():
        card = row.card
        assert card.technique in get_args(get_type_hints(Card)["technique"])
        assert all(getattr(card, name) and set(getattr(card, name)) <= known for name, known in terms.items())
        assert {"human", "automated"} & set(card.feedback)
        assert ("ranked" in card.feedback) >= card.pairs
    rows = {row.kind: dict(zip(HEADS, cells(row), strict=True)) for row in methods()}
    assert (rows["dpo"]["feedback"], rows["dpo"]["safety"]) == ("human, automated, ranked", "constraint or preference")
    assert (rows["kto"]["feedback"], rows["grpo"]["restraint"]) == ("automated, binary", "KL to the base, clipped ratio")


def test_the_cost_is_that_of_the_defaults() -> None:
    forward = next(row for row in methods() if row.kind == "forward")
    assert forward.forwards == 10 + 4 * (3 + 1)  # steps; times x (a forward and a backward, and the base)


def test_shipped_recipes_are_named_by_the_kind_that_they_train() -> None:
    rows = {row.kind: row.recipes for row in methods()}
    assert "safediffusion/recipes/demo.toml" in rows["forward"]
    assert "recipes/studies/methods.toml#ddpo" in rows["ddpo"]
    assert read_toml(ROOT / "recipes" / "paper.toml")["algorithm"]["kind"] == "grpo" and "safediffusion/recipes/paper.toml" in rows["grpo"]


def test_for_pages_and_programs() -> None:
    rows = methods()
    lines = markdown(rows).splitlines()
    assert len(lines) == 2 + len(rows)
    assert len({line.count("|") for line in lines}) == 1
    told = json.loads(as_json(rows))
    assert [each["kind"] for each in told] == [row.kind for row in rows]
    assert {each["kind"] for each in told if each["log_probs"]} == {row.kind for row in rows if row.card.log_probs}


def test_the_page_of_methods_is_what_the_code_says() -> None:
    page = (ROOT.parent / "docs" / "methods.md").read_text(encoding="utf-8")
    assert markdown(methods()).strip() in page, "write the table of docs/methods.md again: safediffusion methods --format markdown"
