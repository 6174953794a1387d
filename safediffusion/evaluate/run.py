"""An evaluation: every model paints the same prompts from the same seeds, instruments look, measures count; files keep it all."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from safediffusion import ranks
from safediffusion.errors import UserError
from safediffusion.evaluate.beforehand import check_enough, check_groups, check_references
from safediffusion.evaluate.measures import Seen, Values, changes, measured
from safediffusion.evaluate.painter import Painter
from safediffusion.evaluate.pictograms import check_size
from safediffusion.evaluate.pictures import Album, Picture, Stored, native_side, paint, pictures_of, stored_as
from safediffusion.evaluate.rows import Rows, load_rows, located
from safediffusion.evaluate.scoring import Columns, Instrument, Look, score
from safediffusion.evaluate.task import Frechet, Task
from safediffusion.policies.families import find_family
from safediffusion.policies.family import Family
from safediffusion.policies.settings import EXACT, Held
from safediffusion.weights import sha256

SCHEMA = 1
Advance = Callable[[str, int], None]


@dataclass(frozen=True)
class Extent:
    """How much is painted, and by models held how. `limit` takes the first prompts of each group; `samples` and `seed` take the place of the task's own."""

    samples: int | None = None
    seed: int | None = None
    limit: int | None = None
    batch: int = 0  # pictures at once on each process; memory, not results; 0 is as many as fit
    held: Held = EXACT

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("limit", 1), ("seed", 0), ("batch", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name} should be at least {least}, but is {value}")


@dataclass(frozen=True)
class Plan:
    """A task with its rows, as it is going to be measured; `painted` says whether a model paints for it, or all its pictures were made elsewhere."""

    task: Task
    rows: Rows
    painted: bool = True

    @property
    def count(self) -> int:
        """Of pictures."""
        return self.task.painting.samples * len(self.rows.kept)

    @property
    def looks(self) -> int:
        """How often an instrument looks at a picture."""
        asked = (sum(not groups or row.group in groups for row in self.rows.kept) for groups in self.task.instruments.values())
        return self.task.painting.samples * sum(asked)

    def pictures(self, native: int) -> tuple[Picture, ...]:
        """P x K, the K pictures of a row together."""
        return tuple(chain.from_iterable(pictures_of(row, self.task.painting, native) for row in self.rows.kept))


def plans(tasks: Sequence[Task], extent: Extent) -> tuple[Plan, ...]:
    """The tasks with their screened rows. Raises UserError for one whose prompts cannot be had."""
    made = []
    for task in tasks:
        painting = task.painting if extent.samples is None else replace(task.painting, samples=extent.samples)
        if extent.seed is not None:
            if painting.seed == "row":
                raise UserError(f"{task.name} takes the seed of each picture from its row; leave --seed out")
            painting = replace(painting, seed=extent.seed)
        plan = Plan(replace(task, painting=painting), load_rows(task, extent.limit))
        check_groups(plan.task, plan.rows)
        check_enough(plan.task, plan.rows.kept)
        check_references(plan.task, plan.rows)
        made.append(plan)
    return tuple(made)


def protocol(planned: Sequence[Plan], instruments: Mapping[str, Instrument], extent: Extent) -> dict[str, Any]:
    """All that decides a number besides the model: two results with equal protocols may be compared."""
    return {"id": ", ".join(plan.task.id for plan in planned), "tasks": {plan.task.name: _protocol(plan, instruments, extent) for plan in planned}}


def _protocol(plan: Plan, instruments: Mapping[str, Instrument], extent: Extent) -> dict[str, Any]:
    from pydantic import TypeAdapter

    groups: dict[str, int] = {}
    for row in plan.rows.kept:
        groups[row.group] = groups.get(row.group, 0) + 1
    told = TypeAdapter(Task).dump_python(plan.task, mode="json")
    files = {name: each for name, each in plan.task.measures.items() if isinstance(each, Frechet) and each.reference}
    references = {name: sha256(located(each.reference, name, how=each.how)) for name, each in files.items()}
    painting = told["painting"] if plan.painted else {"samples": plan.task.painting.samples}  # how others have painted is not known
    return {
        "id": plan.task.id,
        **{name: told[name] for name in ("title", "licence", "citation", "known")},
        "limit": extent.limit,
        "prompts": groups,
        "prompts_sha256": plan.rows.sha256,
        "refused": plan.rows.refused,
        **{f"painting/{name}": value for name, value in painting.items()},
        **{f"painting/{name}": value for name, value in extent.held.facts.items()},
        "measures": told["measures"],
        **({"references": references} if references else {}),
        "instruments": {name: dict(instruments[name].identity) for name in plan.task.instruments},
    }


@dataclass(frozen=True)
class Findings:
    """What was seen of one model: by task, where its pictures lie (None: there is none) and the measures."""

    stored: Mapping[str, tuple[Stored | None, ...]]
    seen: Mapping[str, Seen]
    values: Mapping[str, Mapping[str, Values]]

    def numbers(self) -> dict[str, Any]:
        """Estimates by their names in results.json."""
        return {_name(self.values, task, name): each.estimate().as_dict() for task, found in self.values.items() for name, each in found.items()}

    def changes(self, base: Findings) -> dict[str, Any]:
        """Paired, from `base`."""
        every = ((task, changes(found, base.values[task])) for task, found in self.values.items())
        return {_name(self.values, task, name): each.as_dict() for task, found in every for name, each in found.items()}


def painted(painter: Painter, planned: Sequence[Plan], folder: Path, device: torch.device, batch: int, advance: Callable[[int], None]) -> dict[str, tuple[Stored, ...]]:
    """The pictures of a model by task; those that are missing are painted. The model is loaded only for them."""
    model, digest = painter.variant.folder, painter.digest
    native = native_side(model)
    for plan in planned:
        if any(measure.kind == "pictograms" for measure in plan.task.measures.values()):
            check_size(native, model)
    wanted = {plan.task.name: plan.pictures(native) for plan in planned}
    folder = folder / digest[:16]
    album, every = Album(folder, digest), {picture for each in wanted.values() for picture in each}
    missing = ranks.from_main(lambda: album.missing(every))
    advance(len(every) - len(missing))
    if missing:
        _warn_of_guidance(find_family(model), missing)
        policy = painter.load(device, list(dict.fromkeys(picture.prompt for picture in missing)))
        policy.encode.warn_of_long([picture.prompt for picture in missing])
        for part, images in paint(policy, missing, batch, painter.guided and painter.guided(policy)):
            if ranks.is_main():
                album.add(part, images)
            advance(len(part))
    ranks.from_main(lambda: album.enter(every))
    album = Album(folder, digest) if ranks.count() > 1 else album  # the main process has written
    return {name: tuple(album[picture] for picture in pictures) for name, pictures in wanted.items()}


def _warn_of_guidance(family: Family, pictures: Sequence[Picture]) -> None:
    """One warning where a network that was taught to do without classifier-free guidance is given it."""
    strengths = {picture.guidance for picture in pictures} - {1.0}
    if family.guidance == 1 and strengths:
        warnings.warn(
            f"{family.pipeline} does without classifier-free guidance, and the task asks for a strength of {max(strengths):g}: "
            "these are not the pictures that people know of it; measure it by a task with guidance = 1",
            stacklevel=2,
        )


def see(
    planned: Sequence[Plan],
    stored: Mapping[str, Sequence[Stored | None]],
    instruments: Mapping[str, Instrument],
    folder: Path,
    batch: int,
    advance: Callable[[int], None],
) -> dict[str, Seen]:
    """What every instrument says of the pictures of each task; what it said before is read from `folder`."""
    seen = {}
    for plan in planned:
        rows, columns = plan.rows.kept, {}
        pictures = stored[plan.task.name]
        samples = len(pictures) // len(rows)
        for name, groups in plan.task.instruments.items():
            instrument, own = instruments[name], folder / f"{name}-{_short(instruments[name])}"
            looks = [
                Look(picture, rows[place // samples]) if picture is not None and (not groups or rows[place // samples].group in groups) else None
                for place, picture in enumerate(pictures)
            ]
            scores = score(instrument, [look for look in looks if look is not None], own, batch, advance)
            columns[name] = scores.columns([None if look is None else look.key(instrument.reads_prompt) for look in looks])
            if any(isinstance(measure, Frechet) and measure.instrument == name and not measure.reference for measure in plan.task.measures.values()):
                columns[f"{name}/reference"] = _references(plan, instrument, own, batch)
        seen[plan.task.name] = Seen(rows, samples, columns, tuple(range(len(rows))))
    return seen


def _references(plan: Plan, instrument: Instrument, folder: Path, batch: int) -> Columns:
    """What an instrument says of the rows' own pictures."""
    looks = [Look(stored_as(row.image), row) for row in plan.rows.kept if row.image]
    scores = score(instrument, looks, folder, batch, lambda count: None)
    return scores.columns([look.key(instrument.reads_prompt) for look in looks])


def found(planned: Sequence[Plan], stored: Mapping[str, Sequence[Stored | None]], seen: Mapping[str, Seen], base: Findings | None) -> Findings:
    """The measures of one model; `drift` needs `base`."""
    values = {plan.task.name: measured(plan.task, seen[plan.task.name], base and base.seen[plan.task.name]) for plan in planned}
    return Findings({name: tuple(each) for name, each in stored.items()}, seen, values)


def records(planned: Sequence[Plan], findings: Mapping[str, Findings]) -> Iterator[dict[str, Any]]:
    """One record per picture: every measure of it by name; null where a question has no sense."""
    for model, of in findings.items():
        for plan in planned:
            measures = of.values[plan.task.name].items()
            per_picture = [(name, each, {place: at for at, place in enumerate(each.places)}) for name, each in measures if isinstance(each, Values)]
            samples = of.seen[plan.task.name].samples
            for place, row in enumerate(plan.rows.kept):
                for k in range(samples):
                    picture = of.stored[plan.task.name][place * samples + k]
                    said = {name: _plain(each.values[at[place], min(k, each.values.shape[1] - 1)]) for name, each, at in per_picture if place in at}
                    about = {"task": plan.task.name, "id": row.id, "group": row.group, "prompt": row.prompt.text, "sample": k}
                    yield {"model": model, **about, "sha256": picture and picture.sha256, **said}


def _plain(value: Any) -> float | None:
    return None if np.isnan(value) else round(float(value), 6)


def _name(values: Mapping[str, Any], task: str, name: str) -> str:
    """A metric's name in results.json: that of its task stands before it where there are several."""
    return name if len(values) == 1 else f"{task}:{name}"


def _short(instrument: Instrument) -> str:
    return hashlib.sha256(json.dumps(dict(instrument.identity), sort_keys=True, default=str).encode()).hexdigest()[:12]
