"""A checkpoint is there whole or not at all, and a broken one never loses a run."""

from __future__ import annotations

import resource
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from safediffusion.errors import UserError
from safediffusion.train import checkpoint
from safediffusion.train.checkpoint import Checkpoint, Progress
from safediffusion.weights import CorruptFile


def at(step: int) -> Checkpoint:
    best = {"iteration": 1, "unsafe_rate": 0.5, "sound": True, "composition": float("nan")}
    tensors = {"weight": torch.full((50, 50), float(step)), "bias": torch.arange(3)}
    progress = Progress(step, forwards=1e9 + step, seconds=1.5, cpu_seconds=2.5, best=best, worse_in_a_row=1)
    return Checkpoint(tensors, {"0.exp_avg": torch.ones(2) * step, "0.step": torch.tensor(3.0)}, {"0": torch.zeros(2), "count": torch.tensor(7)}, progress)


def saved(folder: Path, *steps: int, keep_last: int = 9) -> list[str]:
    for step in steps:
        checkpoint.save(folder, at(step), keep_last)
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    found = checkpoint.read(checkpoint.save(tmp_path, at(3), 2))
    for part in ("policy", "optimizer", "average"):
        one, other = getattr(found, part), getattr(at(3), part)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)
    assert repr(found.progress) == repr(at(3).progress)  # NaN, which is not equal to itself, included


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    (tmp_path / "step-notes.safetensors").write_text("mine")
    assert saved(tmp_path, 1, 2, 3, 1000000, keep_last=2) == ["step-000003.safetensors", "step-1000000.safetensors", "step-notes.safetensors"]
    assert checkpoint.latest(tmp_path).progress.step == 1000000


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "missing") is None


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


@pytest.mark.parametrize("broken", [cut, lambda data: data[:5], lambda data: b"", lambda data: b"x" * len(data)])
def test_a_broken_checkpoint_is_passed_over(tmp_path: Path, broken: Callable[[bytes], bytes]) -> None:
    saved(tmp_path, 1, 2)
    newest = tmp_path / "step-000002.safetensors"
    newest.write_bytes(broken(newest.read_bytes()))
    with pytest.warns(UserWarning, match=r"step-000002.*falling back to the checkpoint before it"):
        assert checkpoint.latest(tmp_path).progress.step == 1


def test_a_file_of_other_tensors_is_no_checkpoint(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, tmp_path / "step-000001.safetensors")
    with pytest.raises(CorruptFile, match="is not a checkpoint of a run"):
        checkpoint.read(tmp_path / "step-000001.safetensors")


def test_a_run_is_not_started_over_when_all_are_broken(tmp_path: Path) -> None:
    for name in saved(tmp_path, 1, 2):
        (tmp_path / name).write_bytes(cut((tmp_path / name).read_bytes()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UserError, match=r"no checkpoint in .* can be read; choose another --out"):
            checkpoint.latest(tmp_path)


def test_a_save_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    before = saved(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # as if the disk were full after 4 KiB
    try:
        with pytest.raises(UserError, match="step-000002"):
            checkpoint.save(tmp_path, at(2), 1)
        with pytest.raises(UserError, match="step-000001"):  # nor is a file lost that was to be replaced
            checkpoint.save(tmp_path, replace(at(1), average={}), 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert checkpoint.latest(tmp_path).average.keys() == {"0", "count"}


def test_best_weights_stay_while_a_checkpoint_names_them(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    saved(folder, 1, 2)  # both name iteration 1
    for step in (0, 1, 2):
        checkpoint.write(checkpoint.best_path(tmp_path, step), at(step))
    (tmp_path / "best-of-mine.safetensors").write_text("mine")
    newest = folder / "step-000002.safetensors"
    whole = newest.read_bytes()
    newest.write_bytes(cut(whole))  # what it names cannot be known
    checkpoint.sweep_best(tmp_path, folder)
    assert len(list(tmp_path.glob("best-*"))) == 4
    newest.write_bytes(whole)
    checkpoint.sweep_best(tmp_path, folder)
    assert sorted(path.name for path in tmp_path.glob("best-*")) == ["best-000001.safetensors", "best-of-mine.safetensors"]


def test_best_weights_of_an_older_version_are_read_where_they_are_meant(tmp_path: Path) -> None:
    checkpoint.write(tmp_path / "best.safetensors", at(3))
    assert checkpoint.read_best(tmp_path, 3).progress.step == 3
    with pytest.raises(CorruptFile, match=r"has no best checkpoint: best-000002.safetensors is missing"):
        checkpoint.read_best(tmp_path, 2)
    checkpoint.write(checkpoint.best_path(tmp_path, 2), at(2))
    assert checkpoint.read_best(tmp_path, 2).progress.step == 2
