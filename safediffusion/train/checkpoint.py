"""A checkpoint is one safetensors file, written atomically: trained tensors, optimizer, average, and where the run stands."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor

from safediffusion import weights
from safediffusion.errors import UserError
from safediffusion.files import explained

_NAME = re.compile(r"step-(\d+)\.safetensors")


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
    path = folder / f"step-{checkpoint.progress.step:06d}.safetensors"
    write(path, checkpoint)
    for old in sorted(_steps(folder))[:-keep_last]:
        (folder / f"step-{old:06d}.safetensors").unlink(missing_ok=True)
    return path


def write(path: Path, checkpoint: Checkpoint) -> None:
    parts = {"policy": checkpoint.policy, "optimizer": checkpoint.optimizer, "average": checkpoint.average, "memory": checkpoint.memory}
    tensors = {k: v for name, part in parts.items() for k, v in weights.prefixed(name, part).items()}
    with explained(path):
        weights.save(path, tensors, {"progress": json.dumps(asdict(checkpoint.progress))})


def read(path: Path) -> Checkpoint:
    """Raises weights.CorruptFile for a file that is cut short or is no checkpoint."""
    tensors, metadata = weights.load(path)
    if "progress" not in metadata:
        raise weights.CorruptFile(f"{path} is not a checkpoint of a run")
    policy, optimizer, average, memory = (weights.strip_prefix(name, tensors) for name in ("policy", "optimizer", "average", "memory"))
    return Checkpoint(policy, optimizer, average, Progress(**json.loads(metadata["progress"])), memory)


def latest(folder: Path) -> Checkpoint | None:
    """The newest readable checkpoint; a broken one is passed over with a warning. None when there is none to be read.

    Raises UserError when there are checkpoints and all of them are broken: starting over would lose the run.
    """
    steps = sorted(_steps(folder), reverse=True)
    for step in steps:
        path = folder / f"step-{step:06d}.safetensors"
        try:
            return read(path)
        except weights.CorruptFile as error:
            warnings.warn(f"{error}; falling back to the checkpoint before it", stacklevel=2)
    if steps:
        raise UserError(f"no checkpoint in {folder} can be read; choose another --out to start over")
    return None


def newest(folder: Path) -> int:
    """The iteration of the newest checkpoint, readable or not; 0 without one."""
    return max(_steps(folder), default=0)


def _steps(folder: Path) -> Iterator[int]:
    for path in folder.glob("step-*.safetensors"):
        if match := _NAME.fullmatch(path.name):
            yield int(match[1])
