"""The prompts of a task as rows: where they come from, what is kept of them, and what the screen refuses."""

from __future__ import annotations

import hashlib
import json
import math
import operator
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safediffusion.data.prompts import read_rows, text_of
from safediffusion.data.screen import screen
from safediffusion.data.sets import load_set
from safediffusion.errors import UserError
from safediffusion.evaluate.task import Cases, Columns, Sets, Table, Task
from safediffusion.hub import cache_folder, resolve_file
from safediffusion.types import Prompt
from safediffusion.weights import sha256

_COMPARISONS: dict[str, Callable[[float, float], bool]] = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
_MOST_PIXELS = 4096


@dataclass(frozen=True)
class Row:
    """A prompt of a task, and what its row says of the picture that is wanted. `case` is GenEval's."""

    id: str
    prompt: Prompt
    group: str = ""
    categories: tuple[str, ...] = ()
    seed: int | None = None
    guidance: float | None = None
    width: int | None = None
    height: int | None = None
    image: Path | None = None
    case: Any = None


@dataclass(frozen=True)
class Rows:
    """The rows that may be painted, how many the screen refused, and the digest of what was read. `left_out` are those that the screen or the limit took away."""

    kept: tuple[Row, ...]
    refused: int
    sha256: str
    left_out: tuple[Row, ...] = ()


def data_folder() -> Path:
    """Where a user's own copies of data lie: $SAFEDIFFUSION_DATA, or a folder of the user's cache."""
    return Path(os.environ.get("SAFEDIFFUSION_DATA") or cache_folder() / "data").expanduser()


def load_rows(task: Task, limit: int | None = None) -> Rows:
    """The first `limit` rows of each group of a task, screened. Raises UserError for a source that is not there or not as it should be."""
    source = task.prompts
    if isinstance(source, Sets):
        every = [row for group, name in source.sets.items() for row in _named(group, name)]
    elif isinstance(source, Table):
        every = _table(task, source)
    else:
        every = _cases(task, source)
    found = _first(every, limit)
    refused = {id(prompt) for prompt in screen([row.prompt for row in found]).refused}
    kept = tuple(row for row in found if id(row.prompt) not in refused)
    if not kept:
        raise UserError(f"{task.name}: the prompt screen refused all {len(found)} prompts, so nothing is left to measure on")
    chosen = set(map(id, kept))
    return Rows(kept, len(found) - len(kept), digest(found), tuple(row for row in every if id(row) not in chosen))


def digest(rows: Sequence[Row]) -> str:
    """A hex digest of everything that the rows say, of their own pictures, and of their order."""
    lines = []
    for row in rows:
        told = [row.id, row.prompt.text, row.prompt.unsafe, row.prompt.task, row.group, row.categories, row.seed, row.guidance, row.width, row.height]
        if row.image is not None and row.image.is_file():  # where one is needed and missing, that is said later
            told.append(sha256(row.image))
        if row.case is not None:
            told.append(repr(row.case))
        lines.append(json.dumps(told))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def located(file: str, task: str, hub: str = "", revision: str = "", how: str = "") -> Path:
    """A file of a task: the user's own copy, or that of the hub. UserError says which file to put where."""
    own = data_folder() / file
    if own.is_file():
        return own
    put = f"put it at {own} (another folder: set SAFEDIFFUSION_DATA)"
    if not hub:
        raise UserError(f"{task} needs {file}, which is not here: {how + '; ' if how else ''}{put}")
    return resolve_file(hub, Path(file).name, revision or None, f"for {task} {how + ', and ' if how else ''}{put}")


def _named(group: str, name: str) -> list[Row]:
    unsafe = group != "safe"
    prompts = load_set(name, unsafe)
    return [Row(f"{group}-{place}", Prompt(p.text, p.unsafe or unsafe, p.task), group) for place, p in enumerate(prompts)]


def _cases(task: Task, source: Cases) -> list[Row]:
    from safediffusion.evaluate.geneval import read_metadata

    path = located(source.file, task.name, how=source.how)
    _check_hash(path, source.sha256, task)
    cases = read_metadata(path)
    _check_count(path, len(cases), source.rows)
    return [Row(f"{place:05d}", Prompt(case.prompt, task=case.tag), case.tag, case=case) for place, case in enumerate(cases)]


def _table(task: Task, source: Table) -> list[Row]:
    path = located(source.file, task.name, source.hub, source.revision, source.how)
    _check_hash(path, source.sha256, task)
    columns = source.columns
    wanted = [name for name in vars(columns).values() if name] + list(source.where)
    if path.suffix.lower() == ".txt":
        wanted = ["prompt"]
    rows, ids, read = [], {}, 0
    for number, cells in read_rows(path, wanted, every=True):
        read += 1
        try:
            if not all(_holds(cells[name], condition, name) for name, condition in source.where.items()):
                continue
            row = _row(cells, columns, source, str(read - 1), path.parent)
        except KeyError as error:
            raise UserError(f"{path} line {number}: it has no {error.args[0]!r}") from None
        except ValueError as error:
            raise UserError(f"{path} line {number}: {error}") from None
        if row.id in ids:
            raise UserError(f"{path} line {number}: the id {row.id!r} is that of line {ids[row.id]} too; give each row its own")
        ids[row.id] = number
        rows.append(row)
    _check_count(path, read, source.rows)
    if not rows:
        raise UserError(f"{path} holds no prompts" + (f" where {source.where}" if source.where else ""))
    return rows


def _row(cells: dict[str, Any], columns: Columns, source: Table, place: str, folder: Path) -> Row:
    """Raises ValueError, in the user's words, for a row that makes no sense."""

    def cell(name: str) -> Any:
        return cells[name] if name and cells[name] not in ("", None) else None

    text = text_of(cells[columns.prompt])
    categories = tuple(word.strip() for word in str(cell(columns.categories) or "").split(",") if word.strip())
    image = cell(columns.image)
    return Row(
        id=str(cell(columns.id) if cell(columns.id) is not None else place),
        prompt=Prompt(text, source.unsafe),
        group=str(cell(columns.group) or source.group),
        categories=categories,
        seed=_whole(cell(columns.seed), columns.seed, 0, 2**63 - 1),
        guidance=_number(cell(columns.guidance), columns.guidance),
        width=_whole(cell(columns.width), columns.width, 8, _MOST_PIXELS),
        height=_whole(cell(columns.height), columns.height, 8, _MOST_PIXELS),
        image=folder / str(image) if image else None,
    )


def _number(value: Any, name: str) -> float | None:
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name} should be a number, but is {value!r}")
    return number


def _whole(value: Any, name: str, least: int, most: int) -> int | None:
    number = _number(value, name)
    if number is None:
        return None
    exact = int(str(value)) if re.fullmatch(r"-?\d+", str(value).strip()) else int(number)  # a float holds no seed of 63 bits
    if number != int(number) or not least <= exact <= most:
        raise ValueError(f"{name} should be a whole number from {least} to {most}, but is {value!r}")
    return exact


def _holds(value: Any, condition: str, name: str) -> bool:
    """Whether a cell is what `where` asks for: "> 5", "has word" of a comma list, or just the text."""
    sign, _, rest = condition.partition(" ")
    if sign in _COMPARISONS:
        number = _number(value if value != "" else None, name)
        return number is not None and _COMPARISONS[sign](number, float(rest))
    if sign == "has":
        return rest.strip() in [word.strip() for word in str(value).split(",")]
    return str(value).strip().lower() == condition.strip().lower()


def _first(rows: list[Row], limit: int | None) -> list[Row]:
    if limit is None:
        return rows
    counts: dict[str, int] = {}
    kept = []
    for row in rows:
        counts[row.group] = counts.get(row.group, 0) + 1
        if counts[row.group] <= limit:
            kept.append(row)
    return kept


def _check_count(path: Path, found: int, wanted: int) -> None:
    if wanted and found != wanted:
        raise UserError(f"{path} has {found:,} rows, but this protocol is defined on {wanted:,}; fetch the whole file, or make a task of your own")


def _check_hash(path: Path, wanted: str, task: Task) -> None:
    if wanted and sha256(path) != wanted:
        raise UserError(f"hash mismatch: {path} is not the file that {task.id} was defined on (sha256 {wanted[:12]}...); fetch it again")
