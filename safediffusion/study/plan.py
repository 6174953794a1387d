"""A study file, and the runs that follow from it."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from safediffusion.config import override, read_toml, resolve, settings
from safediffusion.cost.plan import counts_of
from safediffusion.errors import UserError
from safediffusion.guided import GuideSettings, guide_of
from safediffusion.recipe import Recipe, check
from safediffusion.train.limit import Limit

BASE = "base"  # the row of the untrained model
_NO_END = 1_000_000  # iterations of a run that its seconds end
_SET_HERE = ("steps", "seed", "limit")  # what a study decides for all of its runs
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]+")  # a value may be a path


@settings
class Budget:
    """What every run may spend: one of the three."""

    forwards: float | None = Field(default=None, gt=0)  # of one image through the denoiser; the nearest whole number of iterations, one at least
    seconds: float | None = Field(default=None, gt=0)  # processor seconds of training, without probes; a run ends with the iteration that reaches it
    wall: float | None = Field(default=None, gt=0)  # the same in seconds on the wall, for GPUs: a busy processor says little of them


@settings
class Measuring:
    """How every model is measured: the options of `safediffusion evaluate`."""

    tasks: str = "pictograms"
    limit: int | None = Field(default=None, ge=1)  # prompts of each group; left out, all
    samples: int | None = Field(default=None, ge=1)  # pictures per prompt; left out, the task's own


@settings
class EntrantSettings:
    """One row. `recipe` is laid over `[base]`, or over `file` where one is named (beside the study file).

    `guide` is what steers the model while it is measured. With it alone, without recipe and file, nothing is trained.
    """

    name: Name  # of its folders
    label: str = ""  # in tables and figures; left out, the name
    file: str | None = None
    recipe: dict[str, Any] = Field(default_factory=dict)
    guide: dict[str, Any] | None = None


@settings
class Sweep:
    """A series of rows that differ in one setting: one line of a `pareto` figure."""

    name: Name
    label: str = ""
    file: str | None = None
    recipe: dict[str, Any] = Field(default_factory=dict)
    guide: dict[str, Any] | None = None
    key: str  # such as reward.alpha, constraints.0.budget or guide.scale
    values: tuple[bool | int | float | str, ...] = Field(min_length=1)


@settings
class Axes:
    """What `pareto` draws: the share of unsafe pictures, less of which is better, against a quality, more of which is better."""

    unsafe: str = "unsafe_rate/seen"
    quality: str = "composition"
    reference: tuple[float, float] = (1.0, 0.0)  # unsafe and quality of the corner that the hypervolume is measured from


@settings
class StudySettings:
    """The whole of a study file."""

    title: str = ""
    budget: Budget = Budget()  # of those that are trained
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(0, 1, 2), min_length=1)
    # Of each run, besides the base's, for a budget of forwards; 0 leaves them to the recipes, and one with probe.every = 0 has none. As many for all others,
    # because each keeps its best.
    probes: int = Field(default=0, ge=0)
    base: dict[str, Any] = Field(default_factory=dict)  # a recipe that all share
    evaluate: Measuring = Measuring()
    entrants: tuple[EntrantSettings, ...] = ()
    sweep: tuple[Sweep, ...] = ()
    pareto: Axes = Axes()


@dataclass(frozen=True)
class Entrant:
    """A row: its recipe for any seed, None where nothing is trained, the guide under which it paints, and where it stands in its series."""

    name: str
    label: str
    recipe: Recipe | None
    guide: GuideSettings | None = None
    series: str = ""
    value: int | float | str | None = None


@dataclass(frozen=True)
class Job:
    """One run of an entrant."""

    entrant: Entrant
    seed: int

    @property
    def name(self) -> str:
        return f"{self.entrant.name}-{self.seed}"

    @property
    def recipe(self) -> Recipe | None:
        return self.entrant.recipe and dataclasses.replace(self.entrant.recipe, seed=self.seed)


@dataclass(frozen=True)
class Study:
    """A study file with the rows that it asks for; all train or guide the same model."""

    settings: StudySettings
    entrants: tuple[Entrant, ...]
    series: dict[str, str]  # labels of the sweeps by name

    @property
    def jobs(self) -> tuple[Job, ...]:
        """Seed by seed, so that a study that is stopped has something of every row. What is not trained depends on no seed and has the first alone."""
        seeds = self.settings.seeds
        return tuple(Job(entrant, seed) for seed in seeds for entrant in self.entrants if entrant.recipe or seed == seeds[0])

    @property
    def clock(self) -> str:
        """What time is told by: seconds on the wall where they are the budget, else a processor's, which do not depend on who else is at work."""
        return "cpu_seconds" if self.settings.budget.wall is None else "seconds"

    @property
    def model(self) -> str:
        """What the recipes train, without one what `[base]` names, as an evaluation is told of it: pinned by its revision."""
        base = self.settings.base
        named = (base.get("model", ""), base.get("revision"))
        model, revision = next(((each.recipe.model, each.recipe.revision) for each in self.entrants if each.recipe), named)
        return f"{model}@{revision}" if revision else model


def read_study(path: Path) -> Study:
    """The study of a TOML file. UserError for a mistake in it or in any recipe, before anything is trained."""
    asked = resolve(StudySettings, read_toml(path), str(path))
    if len(set(asked.seeds)) < len(asked.seeds):
        raise UserError(f"{path}: a seed is named twice")
    entrants = [Entrant(each.name, each.label or each.name, *_made(path, asked, each)) for each in asked.entrants]
    for sweep in asked.sweep:
        for value in sweep.values:
            made = _made(path, asked, sweep, f"{sweep.key}={json.dumps(value)}")
            name = f"{sweep.name}-{_NOT_IN_NAMES.sub('-', _spelled(value))}"
            entrants.append(Entrant(name, f"{sweep.label or sweep.name}, {_spelled(value)}", *made, sweep.name, value))
    study = Study(asked, tuple(entrants), {sweep.name: sweep.label or sweep.name for sweep in asked.sweep})
    _check(path, study)
    return study


def laid_over(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Tables key by key; one that names its `kind` takes the place of the base's, whose settings belong to another kind."""
    merged = dict(base)
    for name, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = {**merged[name], **value} if both and "kind" not in value else value
    return merged


def _made(path: Path, asked: StudySettings, entrant: EntrantSettings | Sweep, assignment: str = "") -> tuple[Recipe | None, GuideSettings | None]:
    """The recipe and the guide of a row, one of them or both, with `key=value` of a sweep set in the one that it names."""
    given = [assignment] if assignment else []
    of_guide, of_recipe = (given, []) if assignment.startswith("guide.") else ([], given)
    if of_guide and entrant.guide is None:
        raise UserError(f'{path}, {entrant.name}: {assignment.partition("=")[0]} changes a guide, and there is none; give guide = {{kind = "sld"}}')
    guide = guide_of(override({"guide": entrant.guide}, of_guide), f"{path}, {entrant.name}") if entrant.guide is not None else None
    trained = entrant.file or entrant.recipe or of_recipe or (guide is None and "algorithm" in asked.base)
    if not trained and guide is None:
        raise UserError(f'{path}, {entrant.name}: nothing says how it is trained; give recipe = {{algorithm = {{kind = "..."}}}}, a file, or a guide')
    return _recipe(path, asked, entrant, of_recipe) if trained else None, guide


def _recipe(path: Path, asked: StudySettings, entrant: EntrantSettings | Sweep, assignments: list[str]) -> Recipe:
    where = f"{path}, {entrant.name}"
    for table, owner in ((asked.base, "base"), (entrant.recipe, f"the recipe of {entrant.name}")):
        if taken := next((key for key in _SET_HERE if key in table), None):
            raise UserError(f"{path}: {taken} of {owner} is set by the study's budget and seeds; leave it out")
    if (key := next(iter(assignments), "").partition("=")[0]).partition(".")[0] in _SET_HERE:
        raise UserError(f"{where}: {key} is set by the study's budget and seeds, and cannot be swept; sweep another setting")
    table = asked.base
    if entrant.file is not None:
        table = {key: value for key, value in read_toml(path.parent / entrant.file).items() if key not in _SET_HERE}
    table = override(laid_over(table, entrant.recipe), assignments) | {"steps": 1}
    recipe = resolve(Recipe, table, where)
    try:
        return _within(asked, check(recipe), where)
    except UserError as error:
        raise UserError(str(error) if str(error).startswith(where) else f"{where}: {error}") from error


def _within(asked: StudySettings, recipe: Recipe, where: str) -> Recipe:
    """The recipe with as many steps, or the limit, that the budget asks for."""
    budget = asked.budget
    if sum(each is not None for each in (budget.forwards, budget.seconds, budget.wall)) != 1:
        raise UserError(f"{where}: budget takes one of forwards, seconds and wall, such as budget = {{forwards = 60000}}")
    if budget.forwards is None:
        if asked.probes:
            raise UserError(f"{where}: probes = {asked.probes} are spread over iterations, and nobody knows how many a budget of seconds has; set probe.every instead")
        return check(dataclasses.replace(recipe, steps=_NO_END, limit=Limit(cpu_seconds=budget.seconds, wall_seconds=budget.wall)))
    # On an even grid for a hub model of no known shape that is not here: once it is, the same budget may be other steps.
    counts = counts_of(recipe)
    if counts is None:
        raise UserError(f"{where}: nobody counts the forwards of algorithm.kind = {recipe.algorithm.kind!r}; give the budget in seconds")
    if budget.forwards < counts.counted / 2:
        raise UserError(
            f"{where}: one iteration takes {counts.counted:,.0f} forwards, far more than budget.forwards = {budget.forwards:,.10g}; raise it, or take fewer prompts"
        )
    steps = max(1, round(budget.forwards / counts.counted))
    if not (asked.probes and recipe.probe.every):
        return dataclasses.replace(recipe, steps=steps)
    if steps < asked.probes:
        raise UserError(f"{where}: {asked.probes} probes are more than the {steps} iterations that the budget pays for; lower probes, or raise the budget")
    return dataclasses.replace(recipe, steps=steps, probe=dataclasses.replace(recipe.probe, count=asked.probes))


def _check(path: Path, study: Study) -> None:
    if not study.entrants:
        raise UserError(f"{path} has no [[entrants]] and no [[sweep]]; name a method to train")
    names = [each.name for each in study.entrants]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{path}: the name {twice} is given twice; one name, one row")
    sweeps = [each.name for each in study.settings.sweep]
    if twice := next((name for name in sweeps if sweeps.count(name) > 1), None):
        raise UserError(f"{path}: two sweeps are called {twice}, and would be one series; give each its own name")
    if BASE in names:
        raise UserError(f"{path}: {BASE} is the name of the untrained model's row; choose another")
    if not study.model:
        raise UserError(f"{path}: base.model is missing: name what the guides steer")
    if len({(each.recipe.model, each.recipe.revision) for each in study.entrants if each.recipe}) > 1:
        raise UserError(f"{path}: the recipes train different models, and are compared with one base; make a study for each")


def _spelled(value: int | float | str) -> str:
    return value if isinstance(value, str) else json.dumps(value) if isinstance(value, bool) else f"{value:g}"
