"""What a study finds in its folder, and the mistakes that it finds before any of its processes starts."""

from __future__ import annotations

import json
import shlex
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

from safediffusion import build
from safediffusion.config import read_toml, resolve
from safediffusion.errors import UserError
from safediffusion.evaluate.run import Extent, plans
from safediffusion.evaluate.task import choose
from safediffusion.files import read_text
from safediffusion.guided import described
from safediffusion.measurement import PICTURES, SCORES
from safediffusion.policies.variant import variant
from safediffusion.recipe import Recipe
from safediffusion.study.plan import BASE, Job, Measuring, Study
from safediffusion.subjects import locate
from safediffusion.train import run_folder

_FILES = ("prompts", "anchors", "pairs")  # of an identity: what the files of a recipe held
_MEND = "choose another --out, or give the row another name, or remove that folder"


def check(study: Study, folder: Path) -> None:
    """UserError for what no run could begin with, and for a run in `folder` that was made by another recipe or guide; a hub model is fetched."""
    asked, measured = study.settings.evaluate, _run_of(folder / BASE)
    if measured and (subject := shlex.split(measured["command"])[2]) != study.model:
        raise UserError(f"{folder} holds a study of {subject}, and this one is of {study.model}; choose another --out")
    for job in study.jobs:
        _check_run(folder / job.name, job)
    if base_is_there(study, folder) and all(is_there(study, folder, job) for job in study.jobs):
        return  # the tables alone are written, and need no model
    try:
        plans(choose(asked.tasks), Extent(limit=asked.limit, samples=asked.samples))
    except UserError as error:
        raise UserError(f"[evaluate]: {error}") from error
    variant(study.model, locate)
    if measured and (found := run_folder.difference(_extent_of(measured), _extent(asked))):
        warnings.warn(f"{folder} was measured otherwise: {found}. Every run is measured again, and none is trained again", stacklevel=2)


def base_is_there(study: Study, folder: Path) -> bool:
    """Whether the base is measured as the study asks, and what the runs share of it is at hand."""
    out = folder / BASE
    return _extent_of(_run_of(out)) == _extent(study.settings.evaluate) and all((out / each).is_dir() for each in (PICTURES, SCORES))


def is_there(study: Study, folder: Path, job: Job) -> bool:
    """Whether the run is trained and measured as the study asks."""
    measured = _run_of(folder / job.name)
    if _extent_of(measured) != _extent(study.settings.evaluate) or _guide_of(measured) != _guide(job):
        return False
    if job.recipe is None:
        return not measured.get("recipe")
    try:
        return _decisive(resolve(Recipe, measured.get("recipe", {}))) == _decisive(job.recipe)
    except UserError:  # of another version
        return False


def _check_run(out: Path, job: Job) -> None:
    """What compares runs must not go on with one that began as another: its steps, too, decide when it was probed."""
    facts, measured = run_folder.read_facts(out), _run_of(out)
    if job.recipe is None and facts is not None:
        raise UserError(f"{out} is a run that was trained, and the row only guides now; {_MEND}")
    if job.recipe is not None and facts is None and measured:
        raise UserError(f"{out} was measured without a training, and the row has one now; {_MEND}")
    if job.recipe is not None and facts is not None and run_folder.begun(out):
        read = resolve(Recipe, read_toml(out / run_folder.RECIPE), str(out / run_folder.RECIPE))  # what it leaves out, as one of an older version may, is as by default
        was = _decisive(read) | {name: facts["identity"][name] for name in _FILES if name in facts["identity"]}
        if found := run_folder.difference(was, _decisive(job.recipe)):
            raise UserError(f"{out} was trained by another recipe: {found}; {_MEND}")
    if measured and (found := run_folder.difference({"guide": _guide_of(measured)}, {"guide": _guide(job)})):
        raise UserError(f"{out} was measured under another guide: {found}; {_MEND}")


def _decisive(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe decides a result, as JSON."""
    return {name: value for name, value in json.loads(json.dumps(build.identity(recipe))).items() if name != "log"}


def _run_of(folder: Path) -> dict[str, Any]:
    """What the results in a folder say of their making; empty where a study made none there."""
    path = folder / run_folder.RESULTS
    try:
        run = json.loads(read_text(path))["run"] if path.is_file() else {}
        return run if run["command"].startswith("safediffusion evaluate ") else {}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _extent_of(measured: dict[str, Any]) -> dict[str, str]:
    """On how much a command measured, whatever its folders are called; empty for none."""
    words = shlex.split(measured.get("command", ""))
    return {name: value for name, value in pairwise(words) if name in ("--tasks", "--limit", "--samples")}


def _extent(asked: Measuring) -> dict[str, str]:
    named = {"--tasks": asked.tasks, "--limit": asked.limit, "--samples": asked.samples}
    return {name: str(value) for name, value in named.items() if value is not None}


def _guide_of(measured: dict[str, Any]) -> dict[str, Any] | None:
    return measured.get("models", {}).get("trained", {}).get("guide")


def _guide(job: Job) -> dict[str, Any] | None:
    return described(job.entrant.guide) if job.entrant.guide else None
