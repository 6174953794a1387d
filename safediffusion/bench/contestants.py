"""Who is measured: recipes by name or file, made comparable on one model."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safediffusion.bench.shaped import shaped
from safediffusion.config import override, read_toml, resolve
from safediffusion.errors import UserError
from safediffusion.recipe import Recipe, check

RECIPES = Path(__file__).parent.parent / "recipes"


@dataclass(frozen=True)
class Contestant:
    """A recipe and its model, under the names that they were asked for by."""

    name: str
    model: str
    recipe: Recipe


def find_recipe(name: str) -> Path:
    """The file of a recipe: one that the package ships, by its name, or any file by its path."""
    known = {path.stem: path for path in sorted(RECIPES.glob("*.toml"))}
    if name in known:
        return known[name]
    if Path(name).is_file():
        return Path(name)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"give a TOML file, or one of {', '.join(known)}"
    raise UserError(f"{name!r} is no recipe; {hint}")


def contestants(names: Sequence[str], model: str | None, assignments: Sequence[str]) -> tuple[Contestant, ...]:
    """The recipes of these names on `model` (each its own where that is None), with `key.path=value` set in all of them.

    No probes; and no dead groups, because how many there are says more of the reward than of the speed. A shaped model
    is trained on the embedded prompts by the similarity of its shaped CLIP, as a reward of its size and no meaning.
    """
    if not names:
        raise UserError("there is no recipe to measure; name one, such as --recipes demo,paper")
    if len(set(names)) < len(names):
        raise UserError(f"a recipe is named twice in {','.join(names)}; one name, one bar")
    folder = shaped(model) if model else None
    changed = [f"model={json.dumps(str(folder / 'pipeline' if folder else model))}"] if model else []
    if folder:
        changed += ["data.safe=pictograms/train-safe", "data.unsafe=pictograms/train-unsafe"]
    found = []
    for name in names:
        path = find_recipe(name)
        table = override(read_toml(path), [*changed, *assignments])
        if model:
            table.pop("revision", None)
        if folder:
            table["reward"] = {"kind": "similarity", "encoder": str(folder / "reward")}
        found.append(Contestant(name, model or table.get("model", ""), check(_comparable(resolve(Recipe, table, str(path))))))
    return tuple(found)


def _comparable(recipe: Recipe) -> Recipe:
    algorithm: Any = recipe.algorithm
    if "least_spread" in {field.name for field in dataclasses.fields(algorithm)}:
        algorithm = dataclasses.replace(algorithm, least_spread=0.0)
    return dataclasses.replace(recipe, algorithm=algorithm, probe=dataclasses.replace(recipe.probe, every=0))
