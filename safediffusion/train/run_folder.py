"""The folder of a run: made once, entered again only by the same recipe, and by one process at a time."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safediffusion.errors import UserError
from safediffusion.files import explained, read_text, write_json, write_text
from safediffusion.provenance import commit, versions

RECIPE, FACTS, MODEL, RESULTS = "recipe.toml", "run.json", "model", "results.json"
TINY_VAE = "tiny_vae.json"
_LOCK = ".lock"
_DRAFT = re.compile(r"\.[0-9a-f]{16}\.tmp")  # of a file that was being written when its process was killed
# What may change when a run is resumed: how long it goes on (upwards only), and what it leaves behind while it does.
_FREE = ("steps", "log")


@contextmanager
def entered(folder: Path, recipe: str, identity: Mapping[str, Any], command: Sequence[str] = ()) -> Iterator[bool]:
    """Make `folder` the run of `recipe` (TOML text), or go on with it; yields whether there was a run to go on with.

    `identity` is what two commands must share to be the same run. Raises UserError for the folder of another run or of
    something else, for fewer steps than it was started with, and while another process works in it.
    """
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        identity = json.loads(json.dumps(identity))
        facts = read_facts(folder)
        if facts is None:
            _check_empty(folder)
        elif begun(folder):
            _check_same(folder, facts["identity"], identity)
        else:  # it failed before its first line: a mended recipe may have the folder
            facts = None
        _sweep(folder)
        if facts is None or facts["identity"] != identity:
            started = {"started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "command": shlex.join(command), "git": commit(), "versions": versions()}
            write_json(folder / FACTS, {**started, **(facts or {}), "identity": identity})
        if not (folder / RECIPE).is_file() or read_text(folder / RECIPE) != recipe:  # after the facts, without which the folder is not known for a run's
            write_text(folder / RECIPE, recipe)
        yield facts is not None


def read_facts(folder: Path) -> dict[str, Any] | None:
    """What run.json says; None where there is none. Raises UserError for a file that is none of ours."""
    path = folder / FACTS
    if not path.is_file():
        return None
    try:
        facts = json.loads(read_text(path))
    except ValueError:
        facts = None
    if not isinstance(facts, dict) or "identity" not in facts:
        raise UserError(f"{path} is not the record of a run; choose another --out")
    return facts


def is_run(folder: Path) -> bool:
    return (folder / FACTS).is_file() and (folder / RECIPE).is_file()


def difference(one: Any, other: Any, path: str = "") -> str:
    """The key path of the first place in which two trees of JSON differ, with both values; "" when they are equal."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in (*one, *(key for key in other if key not in one)):
            if found := difference(one.get(key), other.get(key), f"{path}.{key}".lstrip(".")):
                return found
        return ""
    return "" if one == other else f"{path} was {_shown(one)} and is now {_shown(other)}"


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _check_empty(folder: Path) -> None:
    others = sorted(path.name for path in folder.iterdir() if path.name != _LOCK and not _DRAFT.fullmatch(path.name))
    if others:
        raise UserError(f"{folder} is not empty and not the folder of a run (it holds {others[0]}); choose another --out")


def begun(folder: Path) -> bool:
    """Whether the run in a folder has anything to go on with."""
    return (folder / "metrics.jsonl").exists() or any(folder.glob("checkpoints/*.safetensors"))


def _check_same(folder: Path, was: dict[str, Any], now: dict[str, Any]) -> None:
    fixed = [{key: value for key, value in each.items() if key not in _FREE} for each in (was, now)]
    if found := difference(*fixed):
        raise UserError(f"{folder} is the folder of another run: {found}; choose another --out, or repeat its own recipe to resume it")
    if now["steps"] > was["steps"] and now.get("optimizer", {}).get("schedule") == "linear":
        raise UserError(f"{folder} fell to its last learning rate over {was['steps']} steps: made longer it would be no run of {now['steps']}; choose another --out")
    if now["steps"] < was["steps"]:
        raise UserError(f"{folder} is a run of {was['steps']} steps, and steps is now {now['steps']}: a run can be made longer, not shorter; choose another --out")


def _sweep(folder: Path) -> None:
    """Remove the drafts of a process that was killed while it wrote: whoever holds the lock is the only writer."""
    for draft in (*folder.glob(".*.tmp"), *folder.glob("checkpoints/.*.tmp")):
        draft.unlink(missing_ok=True)
    for draft in folder.glob(f".{MODEL}.*"):
        shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Only one process at a time works in a folder, which is there. UserError names the other one."""
    import fcntl

    with explained(folder):
        file = open(folder / _LOCK, "a+", encoding="utf-8")  # noqa: SIM115  (closed below; the errors of the body are not this folder's)
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(f"another process ({file.read().strip() or 'unknown'}) is working in {folder}; wait for it, or choose another --out") from None
        with explained(folder):
            file.truncate(0)
            file.write(f"pid {os.getpid()}")
            file.flush()
        yield
