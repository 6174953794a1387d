"""Every recipe that ships resolves, with each command that its head gives."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from safediffusion.cost.blueprints import BLUEPRINTS
from safediffusion.cost.forwards import forwards
from safediffusion.cost.plan import outline
from safediffusion.training import load_recipe

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.toml"))
LARGE = ("sd15", "sd21", "sdxl", "sd35-medium", "flux-dev")


def commands(recipe: Path) -> list[list[str]]:
    """The overrides of each `safediffusion train` in the comments at the head."""
    head = recipe.read_text().split("\nmodel = ")[0].replace("\\\n#", " ")
    lines = [line.split("safediffusion train ", 1)[1] for line in head.splitlines() if "safediffusion train " in line]
    found = [shlex.split(line.split("--out")[0]) for line in lines]
    assert all(words[0] == f"recipes/{recipe.name}" for words in found)
    return [words[1:] for words in found]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_its_commands_resolve(recipe: Path) -> None:
    assert commands(recipe)
    for overrides in ([], *commands(recipe)):
        assert forwards(load_recipe(recipe, overrides)).counted > 0


@pytest.mark.parametrize("name", LARGE)
def test_a_large_model_has_a_card_of_24_and_one_of_80_gb_and_a_known_shape(name: str) -> None:
    (recipe,) = [path for path in RECIPES if path.stem == name]
    assert len(commands(recipe)) == (3 if name == "flux-dev" else 2)  # that one on several cards as well
    assert all(words in recipe.read_text() for words in ("# 24 GB:", "# 80 GB:", "Not yet run on the real weights"))
    assert load_recipe(recipe).model in BLUEPRINTS[name].names


@pytest.mark.slow  # a quarter of a minute for each size of FLUX.1
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch, of its norms
@pytest.mark.parametrize(("processes", "more"), [(2, []), (8, ["policy.image_size=1024", "policy.vae_tile=1024"])])
def test_a_head_has_the_lines_that_dry_run_prints_of_several_processes(processes: int, more: list[str]) -> None:
    (recipe,) = [path for path in RECIPES if path.stem == "flux-dev"]
    *_, shared = commands(recipe)
    (line,) = [line for line in outline(load_recipe(recipe, [*shared, *more])).splitlines() if line.startswith(f"each of {processes} processes: ")]
    assert f"#           {line}\n" in recipe.read_text()
