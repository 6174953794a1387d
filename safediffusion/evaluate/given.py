"""Pictures that somebody else has made: a folder of files, matched to the rows of a task."""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from safediffusion.data.prompts import read_rows
from safediffusion.errors import UserError
from safediffusion.evaluate.beforehand import check_enough
from safediffusion.evaluate.pictures import Stored, stored_as
from safediffusion.evaluate.rows import Row, Rows
from safediffusion.evaluate.run import Extent, Plan
from safediffusion.evaluate.task import Frechet, Measure
from safediffusion.files import explained
from safediffusion.types import Prompt

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MANIFESTS = ("manifest.parquet", "manifest.csv", "manifest.jsonl")
# What needs no prompt: it looks at the picture alone.
WITHOUT_ROWS = ("rate", "count", "score", "frechet")
_MEND = "name files after the rows' ids (12.png, 12_3.png), or write a manifest.csv with the columns file and id or prompt"


@dataclass(frozen=True)
class Given:
    """A picture file and what is said of it: the id of its row, or its prompt, or neither."""

    file: Path
    id: str = ""
    prompt: str = ""


@dataclass(frozen=True)
class Filled:
    """A plan with the files of each of its rows, and what is said of the others, if anything."""

    plan: Plan
    by_row: Sequence[Sequence[Path]]
    dropped: str = ""


def given(folder: Path, planned: Sequence[Plan], extent: Extent | None = None) -> tuple[tuple[Plan, ...], dict[str, tuple[Stored | None, ...]]]:
    """The plans as these pictures can fill them, and the pictures of each by row, None where one has fewer than others.

    A picture belongs to the row that the folder's manifest names (columns `file` and `id` or `prompt`), or, without one, whose id its name
    begins with (`12.png`, `12_3.png`, GenEval's `00012/samples/0003.png`). Those of rows that are not measured, and of none, are
    dropped and counted on stderr. Where no name fits at all, every picture is a row of its own: enough for measures that look at the picture
    alone. Raises UserError where a task needs more than is said, and where no prompt has as many pictures as are asked for.
    """
    extent = extent or Extent()
    found, hashed = _listed(folder), cache(stored_as)
    plans, stored, dropped = [], {}, {}
    for plan in planned:
        filled = _matched(plan, found, folder) or _alone(plan, found, folder, extent)
        check_enough(plan.task, [row for row, files in zip(filled.plan.rows.kept, filled.by_row, strict=True) if files])
        most = max(map(len, filled.by_row))
        samples = extent.samples or most
        if samples > most:
            raise UserError(f"--samples {samples} is more than the {most} that a prompt of {plan.task.name} has at most in {folder}; ask for fewer, or leave it out")
        plans.append(replace(filled.plan, task=replace(plan.task, painting=replace(plan.task.painting, samples=samples)), painted=False))
        stored[plan.task.name] = tuple(hashed(files[k]) if k < len(files) else None for files in filled.by_row for k in range(samples))
        dropped.setdefault(filled.dropped, []).append(plan.task.name)
    for said, tasks in dropped.items():
        if said:
            warnings.warn(f"{folder}, {', '.join(tasks)}: {said}", stacklevel=2)
    return tuple(plans), stored


def _listed(folder: Path) -> list[Given]:
    """The pictures of a folder, or those that a manifest names relative to its own folder."""
    if folder.is_file():
        told = [_told(folder, number, row) for number, row in read_rows(folder, ("file",), every=True)]
        if not told:
            raise UserError(f"{folder} names no pictures; write a line for each, with the columns file and id or prompt")
        return told
    if not folder.is_dir():
        raise UserError(f"--images {folder} is not a folder, and no manifest (.csv, .parquet, .jsonl)")
    for name in MANIFESTS:
        if (folder / name).is_file():
            return _listed(folder / name)
    with explained(folder):
        files = sorted((path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES), key=_in_order)
    if not files:
        raise UserError(f"{folder} holds no pictures ({', '.join(SUFFIXES)})")
    return [Given(file) for file in files]


def _in_order(file: Path) -> list[str | int]:
    """As people count: 12_2.png stands before 12_10.png, so that the first pictures of a prompt are its first."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", file.as_posix())]


def _told(manifest: Path, number: int, row: dict) -> Given:
    file = manifest.parent / str(row.get("file") or "")
    if not file.is_file():
        raise UserError(f"{manifest} line {number}: {file} does not exist")
    return Given(file, str(row.get("id") or ""), str(row.get("prompt") or "").strip())


def _matched(plan: Plan, found: Sequence[Given], folder: Path) -> Filled | None:
    """The plan with the files of its rows; None where nothing says which is whose."""
    kept = len(plan.rows.kept)
    rows = (*plan.rows.kept, *plan.rows.left_out)  # a picture of a row that is left out is known as its, and belongs to no other
    places = list(reversed(list(enumerate(rows))))  # of two rows alike the first has the pictures
    ids, prompts = {_plain(row.id): place for place, row in places}, {row.prompt.text: place for place, row in places}
    by_row: list[list[Path]] = [[] for _ in rows]
    for each in found:
        place = prompts.get(each.prompt) if each.prompt and not each.id else next((ids[name] for name in _names(each) if name in ids), None)
        if place is not None:
            by_row[place].append(each.file)
    used, spare = (sum(map(len, files)) for files in (by_row[:kept], by_row[kept:]))
    if not used + spare and not any(each.id or each.prompt for each in found):
        return None
    if not used:
        left = "belongs to a prompt that the screen and --limit leave of" if spare else "belongs to a prompt of"
        raise UserError(f"no picture of {folder} {left} {plan.task.name}; {_MEND}")
    strange = len(found) - used - spare
    counts = {"of prompts that the prompt screen or --limit left out": spare, "that belong to no prompt": strange}
    said = " and ".join(f"{count} {which}" for which, count in counts.items() if count)
    return Filled(plan, by_row[:kept], f"of {len(found)} pictures {said} are not measured" if said else "")


def _names(each: Given) -> Iterable[str]:
    if each.id:
        return (_plain(each.id),)
    stem = each.file.stem
    folder = each.file.parent.parent.name if each.file.parent.name == "samples" else ""
    return (_plain(name) for name in (folder, stem, re.sub(r"[_-]\d+$", "", stem)) if name)


def _plain(name: str) -> str:
    """An id as it is compared: numbers without leading zeros."""
    return str(int(name)) if name.isdecimal() else name


def _alone(plan: Plan, found: Sequence[Given], folder: Path, extent: Extent) -> Filled:
    """The plan with a row for each picture, which has no prompt; the first of them where a limit is set."""
    if needing := [name for name, measure in plan.task.measures.items() if _needs_rows(measure)]:
        raise UserError(f"{plan.task.name} measures {', '.join(needing)}, which needs the prompt of each picture, and {folder} does not say it: {_MEND}")
    if (extent.samples or 1) > 1:
        raise UserError(f"--samples {extent.samples} is of the pictures of a prompt, and {folder} does not say whose they are: {_MEND}")
    start = folder if folder.is_dir() else folder.parent
    first = found[: extent.limit]
    rows = tuple(Row(Path(os.path.relpath(each.file, start)).as_posix(), Prompt("")) for each in first)
    told = Rows(rows, 0, hashlib.sha256("\n".join(row.id for row in rows).encode()).hexdigest())
    left = len(found) - len(first)
    return Filled(replace(plan, rows=told), [[each.file] for each in first], f"of {len(found)} pictures {left} that --limit left out are not measured" if left else "")


def _needs_rows(measure: Measure) -> bool:
    """Whether a measure asks more than the picture: its prompt, its group, or the picture that lies beside the row."""
    return measure.kind not in WITHOUT_ROWS or bool(measure.groups) or (isinstance(measure, Frechet) and not measure.reference)
