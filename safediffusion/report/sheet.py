"""The protocol sheet of a task: what a reader has to know before the numbers are compared with somebody else's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Sheet:
    """A task in words: lines of (what, how it was), and what others published by the same protocol, by model."""

    id: str
    title: str
    lines: tuple[tuple[str, str], ...]
    known: dict[str, str]


def sheet(name: str, told: Mapping[str, Any], guides: Mapping[str, Mapping[str, Any]] = MappingProxyType({}), given: Sequence[str] = ()) -> Sheet:
    """The sheet of one task from its protocol in results.json, with the guides by model; what is not told there is left out.

    `given` are those whose pictures were made elsewhere: the settings of painting are not theirs.
    """
    prompts = told.get("prompts")
    painting = {key.removeprefix("painting/"): value for key, value in told.items() if key.startswith("painting/")}
    instruments = told.get("instruments")
    lines = {
        "Prompts": _prompts(prompts, told.get("refused"), told.get("limit")) if isinstance(prompts, dict) else "",
        "Pictures": _painting(painting),
        "Made elsewhere": f"the pictures of {', '.join(given)}; how they were painted is not known here" if given else "",
        "Guided while painting": "; ".join(f"{model}, by {_guide(guide)}" for model, guide in guides.items()),
        "Judged by": ", ".join(map(str, instruments)) if isinstance(instruments, dict) else "",
        "Licence": str(told.get("licence") or ""),
        "Cite": str(told.get("citation") or ""),
    }
    known = told.get("known")
    return Sheet(
        id=str(told.get("id") or name),
        title=str(told.get("title") or ""),
        lines=tuple((key, value) for key, value in lines.items() if value),
        known={str(model): str(value) for model, value in known.items()} if isinstance(known, dict) else {},
    )


def _prompts(groups: Mapping[str, Any], refused: Any, limit: Any) -> str:
    counts = [(group, number) for group, number in groups.items() if isinstance(number, int)]
    text = f"{sum(number for _, number in counts):,}"
    if len(counts) > 1:
        text += f" ({', '.join(f'{number:,} {group}' for group, number in counts)})"
    if limit is not None:
        text += f", only the first {limit} of each group: not the whole protocol"
    return text + (f"; the prompt screen refused {refused}" if refused else "")


def _guide(settings: Mapping[str, Any]) -> str:
    """`sld (level strong, concept a dangerous picture)`; of a table within, its kind."""
    said = {key: value.get("kind") if isinstance(value, dict) else value for key, value in settings.items() if key != "kind"}
    return f"{settings.get('kind')} ({', '.join(f'{key} {value}' for key, value in said.items() if value is not None)})"


def _painting(painting: Mapping[str, Any]) -> str:
    words = {
        "samples": "{} per prompt",
        "steps": "{} steps",
        "sampler": "{}",
        "guidance": "guidance {}",
        "size": "size {}",
        "seed": "seed {}",
        "dtype": "{}",
        "quantise": "{} weights",
    }
    row = {"row": "of the row", "model": "of the model"}
    return ", ".join(form.format(row.get(str(painting[key]), painting[key])) for key, form in words.items() if key in painting)
