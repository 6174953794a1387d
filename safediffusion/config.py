"""Recipes: TOML tables become frozen settings, or one sentence that says which key is wrong and what was meant."""

from __future__ import annotations

import copy
import difflib
import json
import re
import tomllib
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, dataclass_transform, get_args, get_origin

import tomli_w
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass, is_pydantic_dataclass

from safediffusion.errors import UserError
from safediffusion.files import read_text

Settings = TypeVar("Settings")


def _rising(ends: tuple[float, float]) -> tuple[float, float]:
    low, high = ends
    if low >= high:
        raise ValueError(f"[{low:g}, {high:g}] is empty; give the lower share first")
    return ends


Share = Annotated[float, Field(ge=0, le=1)]
Interval = Annotated[tuple[Share, Share], AfterValidator(_rising)]  # such as of a schedule, from less noise to more

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a string",
    "path_type": "a path",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a table",
    "dataclass_type": "a table",
}


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(Field,))
def settings(cls: type[Settings]) -> type[Settings]:
    """The decorator of every recipe table: a frozen, keyword-only dataclass that knows its keys and their types.

    Strict: "3" is no integer, true is no number, 2.0 is no integer, nan and inf are no numbers; 1 is taken for a float.
    An option that may be absent is `X | None = None`: TOML has no null, so `dump` leaves it out.
    """
    config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    return dataclass(cls, frozen=True, kw_only=True, config=config)  # type: ignore[return-value]


def read_toml(path: Path | str) -> dict[str, Any]:
    """The tables of a TOML file."""
    try:
        return tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None  # the error ends in "(at line L, column C)"


def override(table: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """A copy of `table` with each `key.path=value` set. A value is read as TOML; what is no TOML is a bare string.

    A list is entered by its index, from 0: `rewards.1.weight=0.5`.
    """
    table = copy.deepcopy(table)
    for assignment in assignments:
        path, sign, value = assignment.partition("=")
        keys = [key.strip() for key in path.split(".")]
        if not sign or not all(keys):
            raise UserError(f"{assignment!r} is not an override; write key.path=value, such as seed=3 or optimizer.lr=1e-4")
        _set(table, keys, _value(value.strip()), assignment)
    return table


def _set(node: Any, keys: list[str], value: Any, assignment: str) -> None:
    for depth, key in enumerate(keys[:-1]):
        at = _place(node, keys[:depth], key, assignment)
        node = node[at] if isinstance(node, list) else node.setdefault(at, {})
    node[_place(node, keys[:-1], keys[-1], assignment)] = value


def _place(node: Any, path: list[str], key: str, assignment: str) -> str | int:
    """What to index `node`, which lies at `path`, with."""
    if isinstance(node, dict):
        return key
    if not isinstance(node, list):
        raise UserError(f"{assignment!r}: {'.'.join(path)} is {node!r}, not a table, so it has no {key!r}")
    if not key.isdecimal() or int(key) >= len(node):
        raise UserError(f"{assignment!r}: {'.'.join(path)} is a list of {len(node)}; {key!r} is not an index of it")
    return int(key)


def _value(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if len(parsed) == 1 else text  # a newline in the text must not smuggle in a second key


def resolve(kind: type[Settings], table: dict[str, Any], where: str = "recipe.toml") -> Settings:
    """The settings that `table` spells out, with defaults for what it leaves out; UserError names the first mistake."""
    # By way of JSON because a TOML array is a list: strict Python input wants a tuple, strict JSON input takes either.
    text = json.dumps(table, default=str)
    try:
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as failure:
        errors = failure.errors(include_url=False)
    # An item that is refused is not counted, so that a list may seem too short for its mistakes.
    inside = {each["loc"][:depth] for each in errors for depth in range(len(each["loc"]))}
    errors = [error for error in errors if error["type"] != "too_short" or error["loc"] not in inside]
    # A misspelt key explains a missing one, so it is named first.
    errors.sort(key=lambda error: error["type"] != "unexpected_keyword_argument")
    more = len(errors) - 1
    also = f" ({more} more mistake{'s' if more > 1 else ''} after this one)" if more else ""
    raise UserError(f"{where}: {_sentence(kind, table, errors[0])}{also}")


def dump(resolved: Any) -> str:
    """TOML text that `resolve` reads back to an equal object."""
    return tomli_w.dumps(_without_none(TypeAdapter(type(resolved)).dump_python(resolved, mode="json")))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _sentence(kind: Any, table: dict[str, Any], error: Any) -> str:
    """What is wrong, in the words of the recipe."""
    loc, reason, context = error["loc"], error["type"], error.get("ctx", {})
    here, path, value = _walk(kind, table, loc)
    name = ".".join(path)
    if reason == "unexpected_keyword_argument":
        return _unknown(_walk(kind, table, loc[:-1])[0], path)
    if reason in ("missing", "missing_argument"):
        return f"{name} is missing"
    if reason == "union_tag_invalid":
        return f"{name}.kind = {context['tag']!r} is not known; it is one of {context['expected_tags']}"
    if reason == "union_tag_not_found":
        return f"{name}.kind is missing; it is one of {', '.join(map(repr, _by_tag(here)))}"
    if reason == "literal_error":
        return f"{name} = {_shown(value)} is not known; it is one of {context['expected'].replace(' or ', ', ')}"
    if reason == "value_error":
        return f"{name}: {context['error']}".removeprefix(": ")
    if reason == "too_short":
        return f"{name} = {_shown(value)} is too short; it needs at least {context['min_length']}"
    if reason in _EXPECTED:
        return f"{name or 'the file'} should be {_EXPECTED[reason]}, but is {_shown(value)}"
    return f"{name} = {_shown(value)} is not allowed: {re.sub('^(Input|String|Tuple) should', 'it should', error['msg'])}"


def _unknown(owner: Any, path: list[str]) -> str:
    *parents, key = path
    prefix = "".join(f"{part}." for part in parents)
    cls = next(iter(_by_tag(owner).values()))
    fields = cls.__pydantic_fields__
    of = f" of {'.'.join(parents)}" if parents else ""
    if "kind" in fields:
        of = f" of {prefix}kind = {_tags(cls)[0]!r}"
    near = difflib.get_close_matches(key, fields, n=1)
    hint = f"did you mean {prefix}{near[0]}?" if near else f"it has {', '.join(fields)}"
    return f"{prefix}{key} is not a setting{of}; {hint}"


def _shown(value: Any) -> str:
    """A value much as TOML writes it, cut to a length that fits a sentence."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _walk(kind: Any, node: Any, loc: tuple[str | int, ...]) -> tuple[Any, list[str], Any]:
    """Follow pydantic's location into a recipe: the type there, the keys that lead there, the value there.

    A location also holds the tags of unions, which are no keys of the recipe; only the types tell the two apart.
    """
    path: list[str] = []
    for part in loc:
        tagged = _by_tag(kind)
        if len(tagged) > 1 and part in tagged:
            kind = tagged[part]
            continue
        if isinstance(node, dict):
            node = node.get(part)
        elif isinstance(node, list) and isinstance(part, int):
            node = node[part] if part < len(node) else None
        else:
            break  # the tag of a union of plain types, such as `int | str`
        kind = _inside(kind, part)
        path.append(str(part))
    return kind, path, node


def _inside(kind: Any, part: str | int) -> Any:
    """The type under a key of a table or an index of a list."""
    for option in _options(kind):
        if is_pydantic_dataclass(option):
            fields = option.__pydantic_fields__
            return fields[part].annotation if part in fields else Any
        if inner := get_args(option):
            return inner[1] if get_origin(option) is dict else inner[0]
    return Any


def _options(kind: Any) -> list[Any]:
    if get_origin(kind) is Annotated:
        return _options(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        return [option for member in get_args(kind) for option in _options(member)]
    return [kind]


def _by_tag(kind: Any) -> dict[Any, Any]:
    """The settings classes that `kind` may be, by the value of their `kind` key (by name for one without)."""
    classes = [option for option in _options(kind) if is_pydantic_dataclass(option)]
    return {tag: cls for cls in classes for tag in _tags(cls)}


def _tags(cls: Any) -> tuple[Any, ...]:
    fields = cls.__pydantic_fields__
    return get_args(fields["kind"].annotation) if "kind" in fields else (cls.__name__,)
