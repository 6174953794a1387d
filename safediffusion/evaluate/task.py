"""What a model can be measured on: a task is a TOML file, and everything that decides its numbers stands in it.

Those that come along lie in `evaluate/tasks/`; a user's own is named by its path. docs/evaluate.md explains every key.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import field
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from safediffusion.config import read_toml, resolve, settings
from safediffusion.errors import UserError
from safediffusion.process.gaussian import Solver

SHIPPED = Path(__file__).parent / "tasks"


@settings
class Sets:
    """Named prompt sets of this package, or prompt files, by group; those of a group other than `safe` are taken for unsafe."""

    kind: Literal["sets"] = "sets"
    sets: dict[str, str] = Field(min_length=1)


@settings
class Columns:
    """What the columns of a table are called. An empty name: the table has none of that."""

    prompt: str = "prompt"
    id: str = ""
    seed: str = ""
    guidance: str = ""
    width: str = ""
    height: str = ""
    categories: str = ""  # a comma list: a row may belong to several
    group: str = ""
    image: str = ""  # a picture of the row's own, for FID, relative to the table


@settings
class Table:
    """A table of prompts (.csv, .jsonl, .parquet, .txt) that is loaded from the hub, or lies on the user's disk."""

    kind: Literal["table"] = "table"
    file: str  # its name in the repository, and in the data folder
    hub: str = ""  # the data set on the hub; without one it is the user's own copy alone
    revision: str = ""
    how: str = ""  # to get it where it is gated, in words
    columns: Columns = field(default_factory=Columns)
    where: dict[str, str] = field(default_factory=dict)  # column to what is kept: "hard = 1", or a comparison such as "> 0"
    rows: int = Field(default=0, ge=0)  # how many there should be, before `where`; 0 is any number
    sha256: str = ""  # of the file, where it is known
    unsafe: bool = True  # how prompts are screened
    group: str = ""  # of every row, where no column says


@settings
class Cases:
    """GenEval's metadata file."""

    kind: Literal["geneval"] = "geneval"
    file: str = "geneval/evaluation_metadata.jsonl"
    how: str = ""
    rows: int = Field(default=0, ge=0)
    sha256: str = ""


Source = Annotated[Sets | Table | Cases, Field(discriminator="kind")]


@settings
class Painting:
    """How pictures are painted. "row" takes a number from the row of its prompt."""

    samples: int = Field(default=1, ge=1)  # pictures per prompt
    steps: int = Field(default=50, ge=1)
    sampler: Solver = "ddim"
    guidance: float | Literal["row"] = 7.5
    size: int | Literal["row", "model"] = "model"  # pixels of a side; "model" is what it was trained for
    seed: int | Literal["row"] = 0  # of a prompt's first picture
    # How a seed becomes noise. "torch": the k-th of the latents that one torch generator of that seed draws, as a diffusers pipeline with
    # num_images_per_prompt does. "prompt": a function of (prompt, seed + k), so that two prompts never share their noise.
    noise: Literal["torch", "prompt"] = "torch"


@settings
class Flag:
    """A picture is flagged where any of `labels` scores above `threshold`."""

    instrument: str
    labels: tuple[str, ...] = Field(min_length=1)
    threshold: float = Field(ge=0, le=1)
    inclusive: bool = False  # whether a score of exactly the threshold counts


@settings
class Rate:
    """Share of pictures that any of `flags` flags, in all and by category; with `draws` also I2P's expected maximum.

    The expected maximum is how bad the worst of `draws` prompts is, each prompt being as bad as the share of its pictures that is flagged (arXiv 2211.05105).
    """

    kind: Literal["rate"] = "rate"
    flags: tuple[Flag, ...] = Field(min_length=1)
    categories: bool = False
    draws: int = Field(default=0, ge=0)
    groups: tuple[str, ...] = ()  # of rows; all where it is left out

    @property
    def instruments(self) -> tuple[str, ...]:
        return tuple(flag.instrument for flag in self.flags)


@settings
class Count:
    """Detections in all pictures together, each label at most once a picture; in all, by label and of the `core` labels."""

    kind: Literal["count"] = "count"
    instrument: str
    labels: tuple[str, ...] = Field(min_length=1)
    core: tuple[str, ...] = ()
    threshold: float = Field(ge=0, le=1)
    groups: tuple[str, ...] = ()


@settings
class Score:
    """Mean of one label's score."""

    kind: Literal["score"] = "score"
    instrument: str
    label: str
    scale: float = Field(default=1.0, gt=0)
    groups: tuple[str, ...] = ()


@settings
class Likeness:
    """What an image-text encoder sees: alignment, and within-prompt diversity and same-seed drift where there is something to compare.

    `scale` 100 is the CLIP score.
    """

    kind: Literal["likeness"] = "likeness"
    instrument: str
    measures: tuple[Literal["alignment", "diversity", "drift", "retention"], ...] = ("alignment", "diversity", "drift")
    scale: float = Field(default=1.0, gt=0)
    groups: tuple[str, ...] = ()  # of rows; all where it is left out


@settings
class Frechet:
    """FID and KID between the pictures and a reference: a file of moments or features, or the rows' own pictures."""

    kind: Literal["frechet"] = "frechet"
    instrument: str = "inception"
    reference: str = ""  # a file of the data folder; left out, the rows' own pictures
    how: str = ""
    groups: tuple[str, ...] = ()


def kid_name(name: str) -> str:
    """What the KID is called that stands beside the FID of that name."""
    return name.replace("fid", "kid") if "fid" in name else f"{name}_kid"


@settings
class Geneval:
    """Share of pictures that hold what was asked, by GenEval's rules; overall is the mean of the tasks."""

    kind: Literal["geneval"] = "geneval"
    instrument: str = "coco-objects"
    groups: tuple[str, ...] = ()


@settings
class Pictograms:
    """The embedded world's own questions: unsafe rates, composition, content kept."""

    kind: Literal["pictograms"] = "pictograms"
    instrument: str = "pictograms"
    groups: tuple[str, ...] = ()


Measure = Annotated[Rate | Count | Score | Likeness | Frechet | Geneval | Pictograms, Field(discriminator="kind")]


@settings
class Task:
    """One named protocol. Its name and version are printed with every number; a change of any number's meaning is a new version."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    version: int = Field(ge=1)
    title: str
    groups: tuple[str, ...] = ()
    needs: str = ""  # what has to be had besides the package, for the list
    licence: str = ""
    citation: str = ""
    known: dict[str, str] = field(default_factory=dict)  # what others published by this protocol, by model
    prompts: Source
    painting: Painting = field(default_factory=Painting)
    measures: dict[str, Measure] = Field(min_length=1)  # under the names of what they measure

    @property
    def id(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def instruments(self) -> dict[str, tuple[str, ...]]:
        """The instruments that it takes, each with the groups of rows that it has to look at; () is all."""
        found: dict[str, tuple[str, ...]] = {}
        for measure in self.measures.values():
            for name in measure.instruments if isinstance(measure, Rate) else (measure.instrument,):
                before = found.get(name, measure.groups)
                found[name] = tuple(dict.fromkeys([*before, *measure.groups])) if before and measure.groups else ()
        return found


def load_task(path: Path) -> Task:
    """A task from its file. UserError names the mistake."""
    return resolve(Task, read_toml(path), str(path))


@cache
def shipped() -> dict[str, Task]:
    """The tasks that come along, by name."""
    tasks = [load_task(path) for path in sorted(SHIPPED.glob("*.toml"))]
    return {task.name: task for task in tasks}


def choose(names: str) -> tuple[Task, ...]:
    """The tasks of a comma list of names, groups and paths of TOML files, each once. UserError names the near miss."""
    known = shipped()
    groups = {group: [task for task in known.values() if group in task.groups] for task in known.values() for group in task.groups}
    chosen: list[Task] = []
    for name in (each.strip() for each in names.split(",")):
        if name in known:
            chosen.append(known[name])
        elif name in groups:
            chosen += groups[name]
        elif name.endswith(".toml"):
            chosen.append(load_task(Path(name)))
        elif name:
            raise UserError(f"there is no task {name!r}; {_hint(name, [*known, *groups])}")
    if not chosen:
        raise UserError(f"--tasks names no task; {_hint('', [*known, *groups])}")
    once = [task for place, task in enumerate(chosen) if task not in chosen[:place]]
    _check_names(once)
    return tuple(once)


def _check_names(tasks: Sequence[Task]) -> None:
    names = [task.name for task in tasks]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two different tasks are called {twice[0]}; give one of them another name")


def _hint(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"the tasks and groups are {', '.join(known)}; --tasks list tells more"
