"""`safediffusion evaluate`: results.json, scores.jsonl, the gallery, and what stands in its way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from safediffusion import measure
from safediffusion.evaluate.run import Extent
from safediffusion.evaluate.statistics import rate
from safediffusion.files import read_jsonl
from safediffusion.hub import EMBEDDED
from safediffusion.images import load_images

METRICS = {"unsafe_rate/seen", "unsafe_rate/unseen", "unsafe_rate/implicit", "composition", "kept", "alignment", "diversity"}
QUICK = ("--limit", 2, "--samples", 2)


@pytest.fixture
def evaluated(run: Path, command) -> Path:
    """The run folder with its evaluation."""
    assert command("evaluate", run, "--against", "pictograms", *QUICK, "--out", run).code == 0
    return run


def read(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_two_models_are_compared_and_every_number_has_its_interval(evaluated: Path) -> None:
    found = read(evaluated)
    assert (found["schema"], found["protocol"]["id"]) == (1, "pictograms@1")
    assert set(found["models"]) == {"base", "trained"}
    assert set(found["models"]["base"]) >= METRICS
    assert set(found["models"]["trained"]) >= METRICS | {"drift"}
    assert set(found["changes"]) >= METRICS
    for numbers in (*found["models"].values(), found["changes"]):
        assert all(set(estimate) == {"value", "low", "high", "n"} for estimate in numbers.values())
    assert found["run"]["recipe"]["model"] == "pictograms"
    assert found["run"]["command"].startswith("safediffusion evaluate ")
    assert found["run"]["wall_seconds"] > 0 < found["run"]["cpu_seconds"]
    assert all(len(digest) == 64 for digest in found["protocol"]["prompts_sha256"].values())
    assert len(found["protocol"]["detector"]["sha256"]) == 64
    assert "sha256:" in found["protocol"]["encoder"]


def test_scores_hold_every_picture_and_add_up_to_the_results(evaluated: Path) -> None:
    rows = read_jsonl(evaluated / "scores.jsonl")
    assert len(rows) == 2 * 4 * 2 * 2  # models, groups, prompts, samples
    seen = [row["unsafe"] for row in rows if (row["model"], row["group"]) == ("trained", "seen")]
    assert rate(np.array(seen, dtype=float)).as_dict() == read(evaluated)["models"]["trained"]["unsafe_rate/seen"]
    assert {(row["composed"] is None) for row in rows if row["group"] != "safe"} == {True}


def test_the_gallery_has_the_same_prompts_and_seeds_for_both(evaluated: Path) -> None:
    rows = json.loads((evaluated / "gallery" / "gallery.json").read_text())["rows"]
    assert [row["group"] for row in rows] == ["unsafe"] * 4 + ["implicit"] * 2 + ["benign"] * 2
    pictures = load_images([evaluated / "gallery" / row[model] for row in rows for model in ("base", "trained")])
    assert pictures.shape == (16, 3, 32, 32)


def test_the_same_evaluation_is_not_repeated_and_another_is_refused(command, evaluated: Path) -> None:
    before = (evaluated / "results.json").read_bytes()
    again = command("evaluate", evaluated, "--against", "pictograms", *QUICK, "--out", evaluated)
    assert again.code == 0
    assert "painting" not in again.err
    more = command("evaluate", evaluated, "--against", "pictograms", "--limit", 3, "--samples", 2, "--out", evaluated)
    more.refused("another measurement", "limit was 2 and is now 3", "choose another --out")
    assert (evaluated / "results.json").read_bytes() == before


def test_python_measures_what_the_command_measures(evaluated: Path, tmp_path: Path) -> None:
    results = measure(evaluated, "pictograms", out=tmp_path / "python", extent=Extent(samples=2, limit=2))
    assert read(tmp_path / "python")["models"] == read(evaluated)["models"]
    assert results.change("composition") is not None


def test_numbers_do_not_depend_on_the_batch(command, tmp_path: Path) -> None:
    for batch in (1, 100):
        assert command("evaluate", "pictograms", *QUICK, "--batch-size", batch, "--out", tmp_path / str(batch)).code == 0
    one, other = (read(tmp_path / batch)["models"]["base"] for batch in ("1", "100"))
    assert all(one[name]["value"] == pytest.approx(other[name]["value"], abs=1e-4, nan_ok=True) for name in one if one[name]["value"] is not None)


def test_one_model_alone(command, tmp_path: Path) -> None:
    ended = command("evaluate", "pictograms", *QUICK, "--out", tmp_path / "alone")
    assert "evaluated alone" in ended.out
    assert set(read(tmp_path / "alone")["models"]) == {"base"}
    copy = shutil.copytree(EMBEDDED / "pipeline", tmp_path / "mine")
    assert command("evaluate", copy, *QUICK, "--out", tmp_path / "other").code == 0
    assert set(read(tmp_path / "other")["models"]) == {"trained"}


def test_tasks(command, tmp_path: Path) -> None:
    assert command("evaluate", "--tasks", "list").out.startswith("pictograms: ")
    command("evaluate", "pictograms", "--tasks", "pictogram", "--out", tmp_path).refused("no task 'pictogram'", "did you mean pictograms?")
    command("evaluate", "pictograms", "--tasks", "i2p", "--out", tmp_path).refused("no task 'i2p'", "the tasks are pictograms")


def test_what_cannot_be_evaluated(command, run: Path, tmp_path: Path) -> None:
    command("evaluate", tmp_path / "none", "--out", tmp_path / "out").refused("none does not exist")
    command("evaluate", "pictograms", "--out", run).refused("is the folder of another run")
    command("evaluate", "pictograms", "--samples", 0, "--out", tmp_path / "out").refused("--samples should be at least 1")
    command("evaluate", "pictograms", "--device", "gpu", "--out", tmp_path / "out").refused("device 'gpu' cannot be used")
    shutil.rmtree(run / "model")
    command("evaluate", run, "--out", tmp_path / "out").refused("has no model yet")
    (tmp_path / "file").write_text("")
    command("evaluate", "pictograms", *QUICK, "--out", tmp_path / "file").refused("is a file, but a folder is needed")
    assert not (tmp_path / "out").exists()


def test_a_model_of_another_size(command, tmp_path: Path) -> None:
    copy = shutil.copytree(EMBEDDED / "pipeline", tmp_path / "large")
    config = json.loads((copy / "unet" / "config.json").read_text())
    (copy / "unet" / "config.json").write_text(json.dumps(config | {"sample_size": 16}))
    command("evaluate", copy, "--out", tmp_path / "out").refused("paints pictures of 64 pixels", "of 32")
