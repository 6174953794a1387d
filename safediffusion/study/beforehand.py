"""Mistakes of a study that are found before any of its processes starts, and runs in its folder that are others than it asks for."""

from __future__ import annotations

import json
import shlex
import tomllib
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

from safediffusion.config import dump, read_toml
from safediffusion.errors import UserError
from safediffusion.evaluate.run import Extent, plans
from safediffusion.evaluate.task import choose
from safediffusion.files import read_text
from safediffusion.guided import described
from safediffusion.policies.variant import variant
from safediffusion.study.plan import BASE, Job, Study
from safediffusion.subjects import locate
from safediffusion.train import run_folder

_EXTENT = ("--tasks", "--limit", "--samples")  # what a study decides of an evaluation


def check(study: Study, folder: Path) -> None:
    """UserError for what no run could begin with, and for a run in `folder` that was made by another recipe or guide; a hub model is fetched."""
    asked = study.settings.evaluate
    try:
        plans(choose(asked.tasks), Extent(limit=asked.limit, samples=asked.samples))
    except UserError as error:
        raise UserError(f"[evaluate]: {error}") from error
    variant(study.model, locate)
    for job in study.jobs:
        _check_run(folder / job.name, job)
    command = run_of(folder / BASE).get("command", "")
    if command and (subject := shlex.split(command)[2]) != study.model:
        raise UserError(f"{folder} holds a study of {subject}, and this one is of {study.model}; choose another --out")
    was, now = extent_of(command), {"--tasks": asked.tasks, "--limit": asked.limit, "--samples": asked.samples}
    if was and (found := run_folder.difference(was, {name: str(value) for name, value in now.items() if value is not None})):
        warnings.warn(f"{folder} was measured otherwise: {found}. Every run is measured again, and none is trained again", stacklevel=2)


def _check_run(out: Path, job: Job) -> None:
    """What compares runs must not go on with one that began as another: its steps, too, decide when it was probed."""
    mend = "choose another --out, or give the row another name, or remove that folder"
    if job.recipe is not None and run_folder.is_run(out) and run_folder.begun(out):
        was, now = (_decisive(table) for table in (read_toml(out / run_folder.RECIPE), tomllib.loads(dump(job.recipe))))
        if found := run_folder.difference(was, now):
            raise UserError(f"{out} was trained by another recipe: {found}; {mend}")
    measured = run_of(out)
    guide = described(job.entrant.guide) if job.entrant.guide else None
    if measured and (found := run_folder.difference({"guide": guide_in(measured)}, {"guide": guide})):
        raise UserError(f"{out} was measured under another guide: {found}; {mend}")


def _decisive(recipe: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in recipe.items() if name != "log"}


def run_of(folder: Path) -> dict[str, Any]:
    """What the results in a folder say of their making; empty where there are none."""
    path = folder / run_folder.RESULTS
    try:
        return json.loads(read_text(path))["run"] if path.is_file() else {}
    except (ValueError, KeyError, TypeError):
        return {}


def guide_in(measured: dict[str, Any]) -> dict[str, Any] | None:
    """The guide of a measurement, by what it says of its making."""
    return measured.get("models", {}).get("trained", {}).get("guide")


def extent_of(command: str) -> dict[str, str]:
    """On how much an `evaluate` command measures, whatever its folders are called; empty for no command."""
    words = shlex.split(command)
    return {name: value for name, value in pairwise(words) if name in _EXTENT}
