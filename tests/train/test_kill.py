"""kill -9 at any moment, also during a save: the same command again ends with the very weights of a run left alone."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from safediffusion.config import dump
from safediffusion.train.checkpoint import best_path, latest_progress
from safediffusion.training import load_recipe, post_train

RECIPE = """
model = "pictograms"
steps = 4
[policy]
train = "full"
[process]
steps = 3
[reward]
kind = "similarity"
encoder = "pictograms"
[algorithm]
kind = "forward"
prompts = 2
group = 2
times = 1
[probe]
every = 2
prompts = 2
samples = 2
[optimizer]
lr = 1e-4
ema = 0.5
[log]
checkpoint_every = 1
"""
PATIENCE = 300  # seconds; a loaded machine is slow


def started(recipe: Path, out: Path) -> subprocess.Popen[str]:
    # As many threads as here, because sums may be rounded otherwise with more.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "MKL_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", "safediffusion", "train", str(recipe), "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def killed(process: subprocess.Popen[str], when: Callable[[], bool]) -> bool:
    """kill -9 as soon as `when` holds; False when the process ended before."""
    deadline = time.monotonic() + PATIENCE
    while not when():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_killed_runs_end_as_one_left_alone(tmp_path: Path, read_metrics: Callable, read_tensors: Callable, assert_same: Callable) -> None:
    recipe, whole, broken = tmp_path / "recipe.toml", tmp_path / "whole", tmp_path / "broken"
    recipe.write_text(RECIPE)
    post_train(recipe, whole)  # in this process: the command and Python are the same

    def drafts() -> set[Path]:
        return set(broken.glob("checkpoints/.*.tmp"))

    def lines() -> int:
        log = broken / "metrics.jsonl"
        return log.read_bytes().count(b"\n") if log.exists() else 0

    assert killed(started(recipe, broken), lambda: bool(drafts()))  # during the first save
    left, done = drafts(), lines()
    assert left
    assert not (broken / "checkpoints/step-000001.safetensors").exists()
    pause = random.uniform(0, 0.3)

    def later() -> bool:  # at some moment after two more lines
        if lines() < done + 2:
            return False
        time.sleep(pause)
        return True

    assert killed(started(recipe, broken), later), f"the run ended within {pause} s"
    last = started(recipe, broken)
    said, _ = last.communicate(timeout=PATIENCE)
    assert last.returncode == 0, said
    assert "resuming after iteration" in said

    assert drafts() == set()
    assert read_metrics(broken) == read_metrics(whole)
    best = best_path(whole, latest_progress(whole / "checkpoints").best["iteration"])
    for name in ("checkpoints/step-000003.safetensors", "checkpoints/step-000004.safetensors", best.name, "model/unet/diffusion_pytorch_model.safetensors"):
        assert_same(read_tensors(broken / name), read_tensors(whole / name))
    assert (broken / "recipe.toml").read_text() == dump(load_recipe(recipe))
