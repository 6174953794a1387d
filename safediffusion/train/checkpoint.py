"""A checkpoint is one safetensors file, written atomically: trained tensors, optimizer, average, and where the run stands."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from safediffusion import weights
from safediffusion.errors import UserError
from safediffusion.files import explained

_NAME = re.compile(r"step-(\d+)\.safetensors")
_BEST = re.compile(r"best-(\d+)\.safetensors")
_OLD_BEST = "best.safetensors"  # of runs from before the iteration was in the name

T = TypeVar("T")


@dataclass(frozen=True)
class Progress:
    """Where a run stands after `step` iterations."""

    step: int = 0
    forwards: float = 0.0
    seconds: float = 0.0  # wall time over all sittings
    cpu_seconds: float = 0.0
    best: dict | None = None  # the probe record of the best checkpoint so far
    worse_in_a_row: int = 0
    trained: float = 0.0  # processor seconds of the iterations alone
    trained_wall: float = 0.0  # wall seconds of the iterations alone


@dataclass(frozen=True)
class Checkpoint:
    policy: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    average: dict[str, Tensor]  # empty without EMA
    progress: Progress
    memory: dict[str, Tensor] = field(default_factory=dict)  # of the algorithm and the objective


def save(folder: Path, checkpoint: Checkpoint, keep_last: int) -> Path:
    """Write `step-N.safetensors`, then remove all but the newest `keep_last`. A full disk leaves the older ones whole."""
    path = path_of(folder, checkpoint.progress.step)
    write(path, checkpoint)
    for old in sorted(_steps(folder))[:-keep_last]:
        path_of(folder, old).unlink(missing_ok=True)
    return path


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}.safetensors"


def write(path: Path, checkpoint: Checkpoint) -> None:
    parts = {"policy": checkpoint.policy, "optimizer": checkpoint.optimizer, "average": checkpoint.average, "memory": checkpoint.memory}
    tensors = {k: v for name, part in parts.items() for k, v in weights.prefixed(name, part).items()}
    with explained(path):
        weights.save(path, tensors, {"progress": json.dumps(asdict(checkpoint.progress))})


def read(path: Path) -> Checkpoint:
    """Raises weights.CorruptFile for a file that is cut short or is no checkpoint."""
    tensors, metadata = weights.load(path)
    progress = _progress(path, metadata)
    policy, optimizer, average, memory = (weights.strip_prefix(name, tensors) for name in ("policy", "optimizer", "average", "memory"))
    return Checkpoint(policy, optimizer, average, progress, memory)


def read_progress(path: Path) -> Progress:
    """Where the run stood, without its tensors. Raises weights.CorruptFile as `read` does."""
    return _progress(path, weights.load_metadata(path))


def _progress(path: Path, metadata: dict[str, str]) -> Progress:
    if "progress" not in metadata:
        raise weights.CorruptFile(f"{path} is not a checkpoint of a run")
    return Progress(**json.loads(metadata["progress"]))


def latest(folder: Path) -> Checkpoint | None:
    """The newest readable checkpoint; a broken one is passed over with a warning. None when there is none to be read.

    Raises UserError when there are checkpoints and all of them are broken: starting over would lose the run.
    """
    return _latest(folder, read)


def latest_progress(folder: Path) -> Progress | None:
    """Where the newest readable checkpoint stands; None and errors as of `latest`."""
    return _latest(folder, read_progress)


def _latest(folder: Path, reading: Callable[[Path], T]) -> T | None:
    steps = sorted(_steps(folder), reverse=True)
    for step in steps:
        try:
            return reading(path_of(folder, step))
        except weights.CorruptFile as error:
            warnings.warn(f"{error}; falling back to the checkpoint before it", stacklevel=3)
    if steps:
        raise UserError(f"no checkpoint in {folder} can be read; choose another --out to start over")
    return None


def newest(folder: Path) -> int:
    """The iteration of the newest checkpoint, readable or not; 0 without one."""
    return max(_steps(folder), default=0)


def best_path(run: Path, step: int) -> Path:
    """The best weights of a run as a probe after iteration `step` found them.

    Each has a file of its own, for a probe comes before the checkpoint that names it: the checkpoint before, which is all
    that a killed run has, names an older one.
    """
    return run / f"best-{step:06d}.safetensors"


def read_best(run: Path, step: int) -> Checkpoint:
    """The best weights that were found after iteration `step`, and no others. Raises weights.CorruptFile where they are missing or broken."""
    path, old = best_path(run, step), run / _OLD_BEST
    if path.is_file():
        return read(path)
    if old.is_file() and (best := read(old)).progress.step == step:
        return best
    raise weights.CorruptFile(f"{run} has no best checkpoint: {path.name} is missing")


def sweep_best(run: Path, folder: Path) -> None:
    """Remove the best weights that no checkpoint in `folder` names. With one that cannot be read all stay: what it names is not known."""
    try:
        bests = [read_progress(path_of(folder, step)).best for step in _steps(folder)]
    except weights.CorruptFile:
        return
    named = {best["iteration"] for best in bests if best}
    for path in run.glob("best-*.safetensors"):
        if (match := _BEST.fullmatch(path.name)) and int(match[1]) not in named:
            path.unlink(missing_ok=True)


def _steps(folder: Path) -> Iterator[int]:
    for path in folder.glob("step-*.safetensors"):
        if match := _NAME.fullmatch(path.name):
            yield int(match[1])
