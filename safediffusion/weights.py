"""Tensors on disk: safetensors only, written atomically, checked by hash."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


class CorruptFile(ValueError):
    """A weight file that cannot be read: cut short by a crash, or not safetensors at all."""


def save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write `tensors` so that at every moment `path` is absent, old and whole, or new and whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, temporary, metadata=metadata or {})
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of a file. Raises CorruptFile when it is cut short or not safetensors."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})
    except (SafetensorError, ValueError, OSError) as error:
        raise CorruptFile(f"{path} cannot be read as safetensors: {error}") from error


def load_metadata(path: Path) -> dict[str, str]:
    """The metadata alone, at no cost in memory. Raises CorruptFile as `load` does: the header says how long the file is to be."""
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, ValueError, OSError) as error:
        raise CorruptFile(f"{path} cannot be read as safetensors: {error}") from error


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{key}": value for key, value in tensors.items()}


def strip_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key[len(prefix) + 1 :]: value for key, value in tensors.items() if key.startswith(prefix + ".")}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimizer by parameter index, flat, so that a checkpoint needs no pickle.

    bitsandbytes nests its quantised moments, which are named by a path, and shares its tables between parameters: a file
    of safetensors holds no tensor twice, so each gets its own. A plain number is named with its type, which it has again when it is read.
    """
    tensors: dict[str, Tensor] = {}
    seen: set[tuple[torch.device, int]] = set()
    for index, entry in optimizer.state_dict()["state"].items():
        for name, value in _leaves(entry):
            if not isinstance(value, Tensor):
                name, value = f"{name}:{type(value).__name__}", torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
            place = (value.device, value.untyped_storage().data_ptr())
            tensors[f"{index}.{name}"] = value.clone() if place in seen else value
            seen.add(place)
    return tensors


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Inverse of `optimizer_tensors`, bit-exact; hyper-parameters stay those of `optimizer`."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        index, path = key.split(".", 1)
        path, _, number = path.partition(":")
        *outer, name = path.split("/")
        entry = state.setdefault(int(index), {})
        for part in outer:
            entry = entry.setdefault(part, {})
        entry[name] = value.item() if number else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _leaves(entry: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in entry.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}{name}/")
        else:
            yield f"{path}{name}", value
