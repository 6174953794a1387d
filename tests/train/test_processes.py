"""Two processes do what one does, to within rounding; when one of them ends, all do."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from safediffusion.cli.app import main

pytestmark = pytest.mark.slow  # three launches; a process takes seconds to start
WORK = Path(__file__).parent / "shared_work.py"
PATIENCE = 900  # seconds; a loaded machine is slow


def launched(launcher: str, *command: object, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Two processes on the CPU."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    asked = {
        "torchrun": ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", port],
        # With --cpu accelerate starts a single process, or leaves the start to mpirun.
        "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", port],
    }[launcher]
    paths = os.pathsep.join([str(folder), str(Path(__file__).parents[2])])
    variables = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **environment}
    return subprocess.run([sys.executable, "-m", *asked, *map(str, command)], capture_output=True, text=True, env=variables, timeout=PATIENCE)


def assert_alike(one: dict[str, Tensor], other: dict[str, Tensor], start: dict[str, Tensor], share: float) -> None:
    """Two trainings that began at `start` differ by no more than this share of the way they went."""
    assert one.keys() == other.keys()
    way, gap = (sum(float((one[key] - to[key]).double().square().sum()) for key in one) ** 0.5 for to in (start, other))
    assert way > 0
    assert gap <= share * way, (gap, way)


def numbers(line: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in line.items() if isinstance(value, int | float)}


@pytest.fixture(scope="module")
def folders(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """What one process has made of the work, and what two have."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    spec = importlib.util.spec_from_file_location("shared_work", WORK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.work(tiny_pipeline, one)
    done = launched("accelerate", WORK, tiny_pipeline, two, folder=two)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("6 pictures: 6 new") == 1  # only the main process speaks
    return one, two


@pytest.mark.parametrize("name", ["forward", "grpo", "single", "ddpo", "d3po", "raft", "kto", "dpo"])
def test_two_processes_learn_what_one_learns(
    folders: tuple[Path, Path], tiny_pipeline: Path, read_metrics: Callable, read_tensors: Callable, assert_same: Callable, name: str
) -> None:
    one, two = folders
    assert_same(*(read_tensors(two / f"{name}-{process}.safetensors") for process in (0, 1)))
    base = read_tensors(tiny_pipeline / "unet/diffusion_pytorch_model.safetensors")
    assert_alike(*(read_tensors(folder / f"{name}-0.safetensors") for folder in (one, two)), base, 1e-3)
    lines, others = (read_metrics(folder / name) for folder in (one, two))
    assert len(lines) == len(others) == 2
    for line, other in zip(lines, others, strict=True):
        assert numbers(line) == pytest.approx(numbers(other), rel=1e-3, abs=1e-6)
    names = [set(read_tensors(folder / name / "checkpoints/step-000002.safetensors")) for folder in (one, two)]
    assert names[0] == names[1]


def test_dead_groups_are_those_of_all_processes(folders: tuple[Path, Path], read_metrics: Callable) -> None:
    assert [line["dead_groups"] for line in read_metrics(folders[1] / "grpo")] == [0.5, 0.5]
    assert [line["dead_groups"] for line in read_metrics(folders[1] / "forward")] == pytest.approx([0.2, 0.2])


def test_two_processes_paint_what_one_paints(folders: tuple[Path, Path]) -> None:
    rows = [[json.loads(line) for line in (folder / "pictures/manifest.jsonl").read_text().splitlines()] for folder in folders]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 6
    for row in rows[0]:
        one, other = (np.asarray(Image.open(folder / "pictures" / row["file"]), dtype=int) for folder in folders)
        assert abs(one - other).max() <= 1


def test_two_processes_measure_what_one_measures(folders: tuple[Path, Path]) -> None:
    one, other = (json.loads((folder / "measured/results.json").read_text()) for folder in folders)
    assert one["protocol"] == other["protocol"]
    for name, estimate in one["models"]["base"].items():
        assert other["models"]["base"][name] == pytest.approx(estimate, abs=1e-4), name
    scores = [(folder / "measured/scores.jsonl").read_text().splitlines() for folder in folders]
    assert len(scores[0]) == len(scores[1]) == 24
    assert (folders[1] / "measured/gallery/gallery.json").is_file()


@pytest.mark.parametrize("name", ["unet-forward", "unet-grpo", "unet-raft", "unet-kto", "unet-d3po", "unet-dpo", "flow-forward", "flow-grpo"])
def test_a_divided_base_teaches_what_a_whole_one_does(
    folders: tuple[Path, Path], read_metrics: Callable, read_tensors: Callable, assert_same: Callable, name: str
) -> None:
    """Processes with fewer living pictures, or none, keep step with the others; what they hold is half of the frozen weights."""
    one, two = folders
    assert_same(*(read_tensors(two / f"{name}-{process}.safetensors") for process in (0, 1)))
    whole, divided = (read_tensors(folder / f"{name}-0.safetensors") for folder in folders)
    start = {key: 0 * value if "lora_B" in key else value for key, value in whole.items()}
    assert_alike(whole, divided, start, 0.05 if name == "flow-forward" else 1e-3)
    for line, other in zip(*(read_metrics(folder / name) for folder in folders), strict=True):
        assert numbers(line) == pytest.approx(numbers(other), rel=2e-2 if name == "flow-forward" else 1e-3, abs=1e-5)
    lies = [json.loads((two / f"held-{process}.json").read_text())[name] for process in (0, 1)]
    alone, _, gathered = json.loads((one / "held-0.json").read_text())[name]
    assert sum(own for own, *_ in lies) == lies[0][1] == alone
    assert max(own for own, *_ in lies) < 0.51 * lies[0][1]
    assert {whole for *_, whole in lies} == {gathered}


def test_a_divided_run_goes_on_with_another_number_of_processes(folders: tuple[Path, Path], read_metrics: Callable, read_tensors: Callable) -> None:
    """An iteration on two processes, one on a single one, one on two again: it ends as the run that a single one made."""
    one, two = folders
    command = ["train", two / "recipe-0.toml", "--out", two / "divided"]
    assert main([*map(str, command), "steps=2"]) == 0
    last = launched("torchrun", "-m", "safediffusion", *command, folder=two)
    assert last.returncode == 0, last.stderr
    assert last.stderr.count("resuming after iteration 2 of 3") == 1
    start, whole, divided = (
        read_tensors(path) for path in (one / "divided/checkpoints/step-000002.safetensors", *(each / "divided/checkpoints/step-000003.safetensors" for each in folders))
    )
    learnt = [{key: value for key, value in each.items() if key.startswith(("policy.", "average."))} for each in (whole, divided, start)]
    assert_alike(*learnt, 0.02)
    for line, same in zip(*([line for line in read_metrics(folder / "divided") if line["kind"] == "train"] for folder in folders), strict=True):
        assert numbers(line) == pytest.approx(numbers(same), rel=0.02, abs=1e-3)
    assert (two / "divided/model/model_index.json").is_file()


RECIPE = """
model = "pictograms"
steps = 3
[policy]
train = "full"
[process]
steps = 2
[reward]
kind = "callable"
function = "frail:redness"
[algorithm]
kind = "forward"
prompts = 3
group = 2
times = 1
[probe]
every = 2
prompts = 3
samples = 2
patience = 0
[optimizer]
lr = 1e-4
ema = 0.5
[log]
checkpoint_every = 1
"""
# Fails at the iteration that FAIL says, on the process that it says.
FRAIL = """
import os

from safediffusion import ranks

calls = 0


def redness(images, prompts):
    global calls
    calls += 1
    process, call = os.environ.get("FAIL", "0 0").split()
    if ranks.index() == int(process) and calls == int(call):
        raise ZeroDivisionError("no light")
    return images[:, 0].mean((1, 2))
"""


def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_metrics: Callable, read_tensors: Callable) -> None:
    """On two, of which one fails, then on one, which fails too, then on two to the end: it ends as the run that was left alone."""
    recipe, broken, whole = tmp_path / "recipe.toml", tmp_path / "broken", tmp_path / "whole"
    recipe.write_text(RECIPE)
    (tmp_path / "frail.py").write_text(FRAIL)
    command = ["-m", "safediffusion", "train", recipe, "--out", broken]

    first = launched("torchrun", *command, folder=tmp_path, FAIL="1 2")
    assert first.returncode != 0
    assert "error (process 1): the reward 'frail:redness' failed: ZeroDivisionError: no light" in first.stderr
    assert [path.name for path in (broken / "checkpoints").iterdir()] == ["step-000001.safetensors"]

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("FAIL", "0 2")
    assert main([*map(str, command[2:])]) == 2
    assert (broken / "checkpoints/step-000002.safetensors").is_file()

    last = launched("torchrun", *command, folder=tmp_path)
    assert last.returncode == 0, last.stderr
    assert last.stderr.count("resuming after iteration 2 of 3") == 1
    assert last.stdout.count("model holds") == 1

    monkeypatch.setenv("FAIL", "0 0")
    assert main(["train", str(recipe), "--out", str(whole)]) == 0
    start, one, other = (
        read_tensors(path) for path in (whole / "checkpoints/step-000002.safetensors", *(f / "checkpoints/step-000003.safetensors" for f in (whole, broken)))
    )
    assert one.keys() == other.keys()
    learnt = [{key: value for key, value in each.items() if key.startswith(("policy.", "average."))} for each in (one, other, start)]
    assert_alike(*learnt, 0.02)
    for line, same in zip(read_metrics(whole), read_metrics(broken), strict=True):
        assert numbers(line) == pytest.approx(numbers(same), rel=0.02, abs=1e-3)
    assert (broken / "model/model_index.json").is_file()


def test_what_a_launcher_would_change_of_a_recipe_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text('model = "pictograms"\nsteps = 1\n[reward]\nkind = "similarity"\nencoder = "pictograms"\n')
    for variable, told in (("MIXED_PRECISION", "mixed precision bf16"), ("GRADIENT_ACCUMULATION_STEPS", "gradient accumulation 4")):
        value = told.split()[-1]
        words = [sys.executable, "-m", "safediffusion", "train", str(file), "--out", str(tmp_path / "run")]
        ended = subprocess.run(words, capture_output=True, text=True, env={**os.environ, f"ACCELERATE_{variable}": value}, timeout=PATIENCE)
        assert ended.returncode == 2 and f"the launcher asks for {told}" in ended.stderr, ended.stderr
