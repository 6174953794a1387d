"""The methods that a recipe can name, as a table made from the code itself: `safediffusion methods`."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from safediffusion.algorithms.card import Card
from safediffusion.config import read_toml, resolve
from safediffusion.cost.forwards import forwards
from safediffusion.recipe import Recipe

_PACKAGE = Path(__file__).parent
_PLACES = (_PACKAGE / "recipes", _PACKAGE.parent / "recipes")  # of the package, and of a checkout


@dataclass(frozen=True)
class Method:
    """One algorithm at its default settings. `forwards` of one image, a backward counts as two; None where nobody counts them."""

    kind: str
    card: Card
    forwards: float | None
    recipes: tuple[str, ...]  # that ship with the package or the repository; an entrant of a study after a #


HEADS = ("method", "technique", "feedback", "needs", "policy", "safety", "forwards", "learns from", "restraint", "safety enters by", "paper", "file", "recipes")


def methods() -> tuple[Method, ...]:
    """Every member of `Recipe.algorithm`, in its order."""
    union = get_type_hints(Recipe)["algorithm"]
    recipes = _recipes()
    return tuple(_method(each, recipes) for each in get_args(union) or (union,))


def cells(method: Method) -> tuple[str, ...]:
    """A row under HEADS."""
    card = method.card
    needs = [words for needed, words in ((card.log_probs, "log-probs"), (card.reward_gradient, "reward gradient"), (card.pairs, "pairs")) if needed]
    cost = "-" if method.forwards is None else f"{method.forwards:.4g}"
    policy = "on-policy" if card.on_policy else "off-policy"
    short = method.kind, card.technique, ", ".join(card.feedback), ", ".join(needs) or "-", policy, " or ".join(card.safety), cost
    return *short, card.signal, ", ".join(card.restraint), card.enters, card.paper, card.file, ", ".join(method.recipes) or "-"


def markdown(rows: tuple[Method, ...]) -> str:
    lines = [HEADS, ("---",) * len(HEADS), *map(cells, rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def as_json(rows: tuple[Method, ...]) -> str:
    return json.dumps([{"kind": each.kind, **dataclasses.asdict(each.card), "forwards_per_image": each.forwards, "recipes": each.recipes} for each in rows], indent=2)


def setting() -> str:
    """At which settings the forwards are counted, in words."""
    process = _default("forward").process
    return f"Forwards per image at each method's defaults, with {process.steps} denoising steps and guidance {process.guidance:g}; a backward counts as two."


def _method(settings: Any, recipes: dict[str, list[str]]) -> Method:
    kind = settings.__pydantic_fields__["kind"].default
    counts = forwards(_default(kind))
    return Method(kind, settings.card, None if counts is None else counts.per_image, tuple(recipes.get(kind, ())))


def _default(kind: str) -> Recipe:
    """The smallest recipe of an algorithm. It is counted, not trained: what it needs besides is left to `check`."""
    return resolve(Recipe, {"model": "pictograms", "steps": 1, "reward": {"kind": "similarity", "encoder": "pictograms"}, "algorithm": {"kind": kind}})


def _recipes() -> dict[str, list[str]]:
    """The shipped files by the kind of algorithm that they name."""
    found: dict[str, list[str]] = {}
    for place in _PLACES:
        for path in sorted(place.rglob("*.toml")):
            name, table = path.relative_to(_PACKAGE.parent).as_posix(), read_toml(path)
            rows = {f"{name}#{each['name']}": each.get("recipe", {}) for each in table.get("entrants", ())} if "budget" in table else {name: table}
            for label, recipe in rows.items():
                if kind := recipe.get("algorithm", {}).get("kind"):
                    found.setdefault(kind, []).append(label)
    return found
