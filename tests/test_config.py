"""Recipes: what resolves, and the sentence for what does not."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from safediffusion.config import dump, override, read_toml, resolve, settings
from safediffusion.errors import UserError

quick = hypothesis_settings(max_examples=50)


@settings
class Lora:
    rank: int = 4
    targets: tuple[str, ...] = ("query", "value")
    dropout: float | None = None


@settings
class Grpo:
    kind: Literal["grpo"] = "grpo"
    beta: Annotated[float, Field(ge=0)] = 0.1
    lora: Lora = Lora()


@settings
class Forward:
    kind: Literal["forward"] = "forward"
    beta: float = 1.0

    def __post_init__(self):
        if self.beta > 5:
            raise ValueError("beta above 5 diverges")


@settings
class Term:
    weight: float
    name: Literal["direction", "steering"] = "direction"


Algorithm = Annotated[Grpo | Forward, Field(discriminator="kind")]


@settings
class Recipe:
    algorithm: Algorithm = Grpo()
    terms: tuple[Term, ...] = ()
    stages: tuple[Algorithm, ...] = ()
    lora: Lora | None = None
    named: dict[str, Lora] = Field(default_factory=dict)
    pair: tuple[float, float] = (0.0, 1.0)
    seed: int = 0
    flag: bool = False
    either: int | str = 0
    out: Path = Path("runs")
    rate: float = 1e-4


def resolved(*assignments, table=None):
    return resolve(Recipe, override(table or {}, assignments))


def complaint(*assignments, table=None):
    with pytest.raises(UserError) as caught:
        resolved(*assignments, table=table)
    return str(caught.value).removeprefix("recipe.toml: ")


def test_an_empty_table_is_the_defaults():
    assert resolved() == Recipe()


def test_a_table_of_every_sort_resolves():
    recipe = resolved(
        "algorithm={kind='forward', beta=2}", "terms=[{weight=1}, {weight=0.5, name='steering'}]", "stages=[{kind='grpo'}]",
        "lora.rank=8", "named.unet.rank=2", "pair=[1, 2]", "seed=3", "flag=true", "out=some/where", "rate=1",
    )  # fmt: skip
    assert recipe.algorithm == Forward(beta=2.0)
    assert recipe.terms == (Term(weight=1.0), Term(weight=0.5, name="steering"))
    assert (recipe.stages, recipe.lora, recipe.named) == ((Grpo(),), Lora(rank=8), {"unet": Lora(rank=2)})
    assert (recipe.pair, recipe.seed, recipe.flag, recipe.out, recipe.rate) == ((1, 2), 3, True, Path("some/where"), 1.0)
    assert isinstance(recipe.rate, float)


@pytest.mark.parametrize(
    "assignments, sentence",
    [
        (["algorithm={kind='grpo', betta=1}"], "algorithm.betta is not a setting of algorithm.kind = 'grpo'; did you mean algorithm.beta?"),
        (["algorithm={kind='grpo', lora={rnk=1}}"], "algorithm.lora.rnk is not a setting of algorithm.lora; did you mean algorithm.lora.rank?"),
        (["sed=1"], "sed is not a setting; did you mean seed?"),
        (["lora.rnk=1"], "lora.rnk is not a setting of lora; did you mean lora.rank?"),
        (["named.unet.rnk=1"], "named.unet.rnk is not a setting of named.unet; did you mean named.unet.rank?"),
        (["stages=[{kind='grpo'}, {kind='forward', lora=1}]"], "stages.1.lora is not a setting of stages.1.kind = 'forward'; it has kind, beta"),
        (["algorithm.kind=grp"], "algorithm.kind = 'grp' is not known; it is one of 'grpo', 'forward'"),
        (["algorithm.beta=1"], "algorithm.kind is missing; it is one of 'grpo', 'forward'"),
        (["stages=[{}]"], "stages.0.kind is missing; it is one of 'grpo', 'forward'"),
        (["terms=[{weight=1, name='other'}]"], "terms.0.name = \"other\" is not known; it is one of 'direction', 'steering'"),
        (["terms=[{}]"], "terms.0.weight is missing"),
        (["pair=[1]"], "pair.1 is missing"),
        (["algorithm=2"], "algorithm should be a table, but is 2"),
        (["terms=3"], "terms should be a list, but is 3"),
        (["named=3"], "named should be a table, but is 3"),
        (["out=3"], "out should be a string, but is 3"),
        (["seed='3'"], 'seed should be a whole number, but is "3"'),
        (["seed=3.0"], "seed should be a whole number, but is 3.0"),
        (["seed=true"], "seed should be a whole number, but is true"),
        (["seed=2020-01-01"], 'seed should be a whole number, but is "2020-01-01"'),
        (["rate=false"], "rate should be a number, but is false"),
        (["rate=inf"], "rate should be a finite number, but is Infinity"),
        (["flag=1"], "flag should be true or false, but is 1"),
        (["lora.dropout=x"], 'lora.dropout should be a number, but is "x"'),
        (["either=1.5"], "either should be a whole number, but is 1.5 (1 more mistake after this one)"),
        (["algorithm={kind='grpo', beta=-1}"], "algorithm.beta = -1 is not allowed: it should be greater than or equal to 0"),
        (["algorithm={kind='forward', beta=9}"], "algorithm: beta above 5 diverges"),
        (["terms=[{wieght=1}]"], "terms.0.wieght is not a setting of terms.0; did you mean terms.0.weight? (1 more mistake after this one)"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_in_one_sentence(assignments, sentence):
    assert complaint(*assignments) == sentence


def test_the_sentence_names_the_file():
    with pytest.raises(UserError, match=r"^mine\.toml: sed is not"):
        resolve(Recipe, {"sed": 1}, where="mine.toml")


def test_a_long_value_is_cut():
    assert len(complaint("seed=" + "x" * 500)) < 120


def test_settings_are_frozen_hashable_and_strict_in_python_too():
    assert hash(Grpo()) == hash(Grpo())
    with pytest.raises(AttributeError):
        Grpo().beta = 2
    with pytest.raises(ValidationError):
        Grpo(betta=2)
    with pytest.raises(ValidationError):
        Lora(rank="3")


def test_override_leaves_its_table_alone_and_enters_lists_by_index():
    table = {"terms": [{"weight": 1.0}, {"weight": 2.0}], "algorithm": {"kind": "grpo"}}
    assert override(table, ["terms.1.weight=3", "algorithm.beta = 0.5", "new.key=a b"]) == {
        "terms": [{"weight": 1.0}, {"weight": 3}],
        "algorithm": {"kind": "grpo", "beta": 0.5},
        "new": {"key": "a b"},
    }
    assert table["terms"][1] == {"weight": 2.0}
    assert "new" not in table


def test_a_later_override_wins():
    assert override({}, ["seed=1", "seed=2"]) == {"seed": 2}


@pytest.mark.parametrize(
    "text, value",
    [
        ("3", 3),
        ("1e-4", 1e-4),
        ("true", True),
        ("[1, 2]", [1, 2]),
        ('"3"', "3"),
        ("True", "True"),
        ("grpo", "grpo"),
        ("a=b", "a=b"),
        ("", ""),
        ("1\nother = 2", "1\nother = 2"),
    ],
)
def test_a_value_is_toml_or_a_bare_string(text, value):
    assert override({}, [f"key={text}"]) == {"key": value}


@pytest.mark.parametrize("assignment", ["seed", "=3", "a..b=3", ".=1", ""])
def test_what_is_no_assignment_is_refused(assignment):
    with pytest.raises(UserError, match="key.path=value"):
        override({}, [assignment])


@pytest.mark.parametrize(
    "assignment, sentence",
    [
        ("seed.x=3", "seed is 1, not a table"),
        ("seed.x.y=3", "seed is 1, not a table"),
        ("terms.2.weight=3", "terms is a list of 1"),
        ("terms.last=3", "'last' is not an index"),
    ],
)
def test_a_path_through_what_is_no_table_is_refused(assignment, sentence):
    with pytest.raises(UserError, match=sentence):
        override({"seed": 1, "terms": [{"weight": 1}]}, [assignment])


@quick
@given(
    st.builds(
        Recipe,
        algorithm=st.builds(Grpo, beta=st.floats(0, 1e9), lora=st.builds(Lora)) | st.builds(Forward, beta=st.floats(-9, 5)),
        terms=st.lists(st.builds(Term, weight=st.floats(-9, 9)), max_size=3).map(tuple),
        stages=st.just((Grpo(), Forward())),
        lora=st.none() | st.builds(Lora, rank=st.integers(0, 2**40), targets=st.lists(st.text()).map(tuple)),
        named=st.dictionaries(st.text(), st.builds(Lora), max_size=2),
        pair=st.just((1.0, 2.0)),
        seed=st.integers(-(2**62), 2**62),
        flag=st.booleans(),
        either=st.integers(0, 5) | st.text(),
        out=st.sampled_from([Path("runs"), Path("/tmp/a b")]),
        rate=st.floats(1e-9, 1),
    )
)
def test_what_is_dumped_resolves_to_an_equal_object(recipe):
    assert resolve(Recipe, tomllib.loads(dump(recipe))) == recipe


def test_read_toml(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text('\ufeffseed = 3\n[algorithm]\nkind = "grpo"\n', encoding="utf-8")
    assert read_toml(path) == {"seed": 3, "algorithm": {"kind": "grpo"}}


def test_read_toml_says_what_is_wrong(tmp_path):
    path = tmp_path / "recipe.toml"
    with pytest.raises(UserError, match="does not exist"):
        read_toml(path)
    with pytest.raises(UserError, match="is a folder"):
        read_toml(tmp_path)
    path.write_bytes(b"seed = 3\nname = '\xff'\n")
    with pytest.raises(UserError, match="line 2 is not UTF-8"):
        read_toml(path)
    with pytest.raises(UserError, match="a part of its path is a file"):
        read_toml(path / "inner.toml")
    path.write_text("seed = 3\nseed == 4\n")
    with pytest.raises(UserError, match=r"not valid TOML.*line 2"):
        read_toml(path)
