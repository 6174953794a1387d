"""`safediffusion evaluate`: results.json, scores.jsonl, the gallery, and what stands in its way."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from safediffusion import measure
from safediffusion.evaluate.run import Extent
from safediffusion.evaluate.statistics import clustered_rate
from safediffusion.files import read_jsonl
from safediffusion.hub import EMBEDDED
from safediffusion.images import load_images
from safediffusion.measurement import results_of

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
    protocol = found["protocol"]["tasks"]["pictograms"]
    assert len(protocol["prompts_sha256"]) == 64
    assert len(protocol["instruments"]["pictograms"]["sha256"]) == 64
    assert "sha256:" in protocol["instruments"]["pictograms-judge"]["encoder"]


def test_scores_hold_every_picture_and_add_up_to_the_results(evaluated: Path) -> None:
    rows = read_jsonl(evaluated / "scores.jsonl")
    assert len(rows) == 2 * 4 * 2 * 2  # models, groups, prompts, samples
    seen = [row["unsafe_rate/seen"] for row in rows if (row["model"], row["group"]) == ("trained", "seen")]
    assert clustered_rate(np.array(seen).reshape(-1, 2)).as_dict() == read(evaluated)["models"]["trained"]["unsafe_rate/seen"]
    assert {row["group"] for row in rows if "composition" in row} == {"safe"}


def test_every_number_can_be_traced_to_a_picture_on_disk(evaluated: Path) -> None:
    lines = [line for manifest in (evaluated / "pictures").glob("*/manifest.jsonl") for line in read_jsonl(manifest)]
    on_disk = {hashlib.sha256(file.read_bytes()).hexdigest() for file in (evaluated / "pictures").glob("*/*/*.png")}
    assert len(lines) == 2 * 4 * 2 * 2
    assert on_disk == {row["sha256"] for row in read_jsonl(evaluated / "scores.jsonl")} == {line["sha256"] for line in lines}


def test_the_gallery_has_the_same_prompts_and_seeds_for_both(evaluated: Path) -> None:
    rows = [row for row in json.loads((evaluated / "gallery" / "gallery.json").read_text())["rows"] if row["group"] != "worst"]
    assert sorted(row["group"] for row in rows) == ["benign"] * 2 + ["implicit"] * 2 + ["unsafe"] * 4
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


def test_what_is_there_is_not_made_again(command, evaluated: Path) -> None:
    before = read(evaluated)
    (evaluated / "results.json").unlink()
    (evaluated / "pictures").rename(evaluated / "away")  # a painted picture would have to go somewhere
    shutil.copytree(evaluated / "away", evaluated / "pictures", copy_function=shutil.copy2)
    made = {file: file.stat().st_mtime_ns for file in (evaluated / "pictures").glob("*/*/*.png")}
    assert command("evaluate", evaluated, "--against", "pictograms", *QUICK, "--out", evaluated).code == 0
    assert {file: file.stat().st_mtime_ns for file in (evaluated / "pictures").glob("*/*/*.png")} == made
    assert read(evaluated)["models"] == before["models"]


def test_a_lost_picture_is_painted_again_and_a_changed_one_is_looked_at_again(command, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert command("evaluate", "pictograms", *QUICK, "--out", out).code == 0
    before, pictures = read(out)["models"], sorted((out / "pictures").glob("*/*/*.png"))
    pictures[0].unlink()
    shutil.copy(pictures[1], pictures[2])
    (out / "results.json").unlink()
    assert command("evaluate", "pictograms", *QUICK, "--out", out).code == 0
    assert pictures[0].is_file()
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in pictures]
    assert sorted(row["sha256"] for row in read_jsonl(out / "scores.jsonl")) == sorted(digests)
    assert read(out)["models"]["base"].keys() == before["base"].keys()


def test_a_guided_model_is_another_one_to_its_base(command, tmp_path: Path) -> None:
    out, asked = tmp_path / "out", ("evaluate", "pictograms", "--against", "pictograms", "--limit", 1, "--samples", 1, "--out", tmp_path / "out")
    sld = ("--guide", "sld", "--guide-set", "level=max", "--guide-set", "concept=a dangerous picture")
    assert command(*asked, *sld).code == 0
    found = read(out)
    assert [each.get("guide", {}).get("level") for each in found["run"]["models"].values()] == [None, "max"]
    assert found["models"]["trained"]["drift"]["value"] > 0
    made = {file: file.stat().st_mtime_ns for file in (out / "pictures").glob("*/*/*.png")}
    assert len(made) == 2 * 4 and len(list((out / "pictures").iterdir())) == 2
    assert command("report", out, "--format", "markdown").code == 0
    assert "trained, by sld (level max, concept a dangerous picture)" in (out / "report" / "report.md").read_text()
    command(*asked).refused("another measurement", "models.trained.guide was", "is now null")
    command(*asked, *sld[:-1], "concept=a hazard").refused("another measurement", "models.trained.guide.concept was")
    (out / "results.json").unlink()
    assert command(*asked[:2], *asked[4:], *sld).code == 0  # alone, by the pictures that are there
    assert list(read(out)["models"]) == ["trained"]
    (out / "results.json").unlink()
    assert command(*asked[:2], *asked[4:]).code == 0
    assert {file: file.stat().st_mtime_ns for file in (out / "pictures").glob("*/*/*.png")} == made


def test_another_arithmetic_is_another_protocol(command, tmp_path: Path) -> None:
    out, asked = tmp_path / "out", ("evaluate", "pictograms", "--limit", 1, "--samples", 1, "--out", tmp_path / "out")
    assert command(*asked, "--dtype", "bfloat16", "--text-encoders", "drop").code == 0
    half = read(out)
    assert half["protocol"]["tasks"]["pictograms"]["painting/dtype"] == half["run"]["models"]["base"]["dtype"] == "bfloat16"
    assert half["run"]["command"].endswith("--dtype bfloat16 --text-encoders drop")
    assert command("report", out, "--format", "markdown").code == 0
    assert "seed 0, bfloat16" in (out / "report" / "report.md").read_text()
    assert "text_encoders" not in str(half["protocol"]) + str(half["run"]["models"])  # who encodes where decides no picture
    command(*asked).refused("another measurement", "dtype was", "is now null")
    assert command(*asked[:-1], tmp_path / "exact").code == 0
    exact = read(tmp_path / "exact")
    assert "painting/dtype" not in exact["protocol"]["tasks"]["pictograms"] and "dtype" not in exact["run"]["models"]["base"]
    (ours,), (theirs,) = ((folder / "pictures").iterdir() for folder in (out, tmp_path / "exact"))
    assert ours.name != theirs.name
    command("compare", out, tmp_path / "exact").refused("dtype")
    (tmp_path / "pictures").mkdir()
    told = command("evaluate", "--images", tmp_path / "pictures", "--dtype", "bfloat16", "--out", tmp_path / "no")
    told.refused("--dtype is of a model", "--images are painted already")


def test_a_trained_model_under_a_guide_is_not_the_one_that_is_exported(command, run: Path) -> None:
    alike = ("evaluate", run, "--limit", 1, "--samples", 1, "--out", run)
    judge = EMBEDDED / "judge"
    assert command(*alike, "--guide", "reward", "--guide-set", "reward.kind=similarity", "--guide-set", f"reward.encoder={judge}").code == 0
    assert results_of(run, run / "model") is None
    assert f"the encoder {judge} had a part in the reward of the guide and grades here as well" in read(run)["warnings"]
    (run / "results.json").unlink()
    assert command(*alike).code == 0
    assert results_of(run, run / "model") is not None


def test_a_guide_that_cannot_be_put_on(command, tmp_path: Path) -> None:
    command("evaluate", "pictograms", "--guide-set", "level=max", "--out", tmp_path / "out").refused("--guide-set changes a guide, and there is none")
    (tmp_path / "pictures").mkdir()
    command("evaluate", "--images", tmp_path / "pictures", "--guide", "sld", "--out", tmp_path / "out").refused("--images are painted already")


def test_several_models_share_prompts_and_seeds(command, run: Path, tmp_path: Path) -> None:
    assert command("evaluate", "pictograms", run, *QUICK, "--out", tmp_path / "out").code == 0
    found = read(tmp_path / "out")
    assert set(found["models"]) == {"pictograms", run.name}
    assert found["changes"] == {}
    command("evaluate", run, run, *QUICK, "--out", tmp_path / "twice").refused("the same model is named twice")


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
    listed = command("evaluate", "--tasks", "list").out
    assert all(name in listed for name in ("pictograms", "i2p-official", "geneval-hf", "safety"))
    command("evaluate", "pictograms", "--tasks", "pictogram", "--out", tmp_path).refused("no task 'pictogram'", "did you mean pictograms?")
    command("evaluate", "pictograms", "--tasks", "xyz", "--out", tmp_path).refused("no task 'xyz'", "the tasks and groups are", "pictograms")


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


@pytest.fixture
def i2p(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's own copy of I2P in its real layout, with prompts of the embedded world."""
    monkeypatch.setenv("SAFEDIFFUSION_DATA", str(tmp_path / "data"))
    header = "prompt,categories,hard,inappropriate_percentage,nudity_percentage,q16_percentage,sd_safety_percentage,prompt_toxicity,lexica_url,"
    header += "sd_seed,sd_guidance_scale,sd_image_width,sd_image_height,sd_model\n"
    row = '"a red ring, {0}","violence, hate",0,50,0,10.5,0,0.1,https://example.org/{0},{0},7,64,32,1.5\n'
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "i2p_benchmark.csv").write_text(header + "".join(row.format(number) for number in range(4703)))
    return tmp_path


def test_a_hub_task_runs_from_a_local_copy_and_a_second_protocol_paints_nothing(command, i2p: Path) -> None:
    pytest.importorskip("nudenet")
    out = i2p / "out"
    assert command("evaluate", "pictograms", "--tasks", "i2p-nudenet-rece", "--limit", 3, "--out", out).code == 0
    found = read(out)
    assert found["protocol"]["tasks"]["i2p-nudenet-rece"]["instruments"]["nudenet"]["channels"].startswith("BGR")
    assert found["models"]["base"]["detections"]["n"] == 3
    assert {load_images([file]).shape for file in (out / "pictures").glob("*/*/*.png")} == {(1, 3, 32, 64)}
    made = {file: file.stat().st_mtime_ns for file in (out / "pictures").glob("*/*/*.png")}
    (out / "results.json").unlink()
    task = (Path(__file__).parents[2] / "safediffusion/evaluate/tasks/i2p-nudenet-rece.toml").read_text()
    (i2p / "other.toml").write_text(task.replace('name = "i2p-nudenet-rece"', 'name = "other"').replace("threshold = 0.6", "threshold = 0.3"))
    assert command("evaluate", "pictograms", "--tasks", i2p / "other.toml", "--limit", 3, "--out", out).code == 0
    assert read(out)["protocol"]["id"] == "other@1"
    assert {file: file.stat().st_mtime_ns for file in (out / "pictures").glob("*/*/*.png")} == made


def test_pictures_of_somebody_else_are_measured_without_a_model(command, i2p: Path) -> None:
    pytest.importorskip("nudenet")
    command("generate", "pictograms", "--prompt", "a red ring", "--samples", 2, "--steps", 2, "--out", i2p / "theirs")
    (i2p / "theirs" / "manifest.jsonl").unlink()
    ended = command("evaluate", "--images", i2p / "theirs", "--tasks", "i2p-nudenet-rece", "--out", i2p / "out")
    assert (ended.code, read(i2p / "out")["models"]["trained"]["detections"]["n"]) == (0, 2)
    command("evaluate", "--images", i2p / "theirs", "--tasks", "pictograms", "--out", i2p / "no").refused("needs the prompt of each picture")


def test_training_on_test_prompts_is_said(command, run: Path, tmp_path: Path) -> None:
    recipe = run / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("pictograms/train-unsafe", "pictograms/test-unsafe-seen"))
    assert command("evaluate", run, *QUICK, "--out", run).code == 0
    assert any("were trained on" in warning for warning in read(run)["warnings"])


def test_of_several_models_each_warning_names_its_own(command, run: Path, tmp_path: Path) -> None:
    other, told = shutil.copytree(run, tmp_path / "other"), (run / "recipe.toml").read_text()
    told = told.replace('kind = "similarity"\nencoder = "pictograms"', f'kind = "similarity"\nencoder = "{EMBEDDED / "judge"}"')
    (run / "recipe.toml").write_text(told)
    (other / "recipe.toml").write_text(told.replace("pictograms/train-unsafe", "pictograms/test-unsafe-seen"))
    shared, grader = "1 of the 4 prompts of pictograms were trained on", f"the encoder {EMBEDDED / 'judge'} had a part in the reward or a constraint of training"
    quick = ("--limit", 1, "--samples", 1, "--out")
    assert command("evaluate", "pictograms", run, other, *quick, tmp_path / "three").code == 0
    assert read(tmp_path / "three")["warnings"] == [f"run, other: {grader} and grades here as well", f"other: {shared}"]
    assert command("evaluate", "pictograms", "--against", other, *quick, tmp_path / "two").code == 0
    assert read(tmp_path / "two")["warnings"] == [f"base: {shared}", f"base: {grader} and grades here as well"]


def test_a_detector_of_the_reward_that_grades_too_is_said(command, run: Path, i2p: Path) -> None:
    pytest.importorskip("nudenet")
    recipe, parts = run / "recipe.toml", ('{kind = "detection", detector = "nudenet", labels = ["FEET_EXPOSED"]}', '{kind = "detection"}')
    table = "".join(f'[[reward.parts]]\nname = "part{number}"\nreward = {part}\n' for number, part in enumerate(parts))
    recipe.write_text(recipe.read_text().replace('[reward]\nkind = "similarity"\nencoder = "pictograms"', f'[reward]\nkind = "combined"\n{table}'))
    for task, grades in (("i2p-nudenet-rece", True), ("pictograms", False)):  # a reward's "pictograms" is the guard, which grades nothing
        assert command("evaluate", run, "--tasks", task, *QUICK, "--out", i2p / task).code == 0
        assert any("the detector nudenet had a part in the reward" in warning for warning in read(i2p / task)["warnings"]) == grades
