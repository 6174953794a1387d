"""`safediffusion tiny build` end to end, in a few steps of each stage."""

import json

import pytest
import torch

from safediffusion import weights
from safediffusion.errors import UserError
from safediffusion.tiny.build import STAGES, build
from safediffusion.tiny.stages import TRAINING, Plan


def hashes(folder):
    return json.loads((folder / "hashes.json").read_text())


def test_a_build_killed_again_and_again_equals_an_uninterrupted_one(built, tmp_path, short_plan, monkeypatch):
    """Killed after its 1st saved file (amid a stage), its 3rd (between two stages) and its 6th (amid a later one)."""
    save, saves = weights.save, []

    def dying(*arguments):
        save(*arguments)
        saves.append(arguments[0].name)
        if len(saves) in (1, 3, 6):
            raise KeyboardInterrupt

    monkeypatch.setattr(weights, "save", dying)
    for life in range(3):
        torch.manual_seed(life)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path / "out", tmp_path / "work", plan=short_plan)
        assert not (tmp_path / "out").exists()
    build(tmp_path / "out", tmp_path / "work", plan=short_plan)
    assert hashes(tmp_path / "out") == hashes(built / "out")
    assert saves.count("detector.safetensors") == 3  # two checkpoints and the result: nothing was trained twice


def test_what_is_there_is_not_trained_again(built, tmp_path, short_plan, capsys):
    before = {path: path.stat().st_mtime_ns for path in (built / "work").rglob("*.safetensors")}
    build(tmp_path / "out", built / "work", plan=short_plan)
    assert {path: path.stat().st_mtime_ns for path in (built / "work").rglob("*.safetensors")} == before
    assert hashes(tmp_path / "out") == hashes(built / "out")
    assert capsys.readouterr().err.count("already there") == len(TRAINING)


def test_the_callers_threads_and_random_numbers_are_left_alone(built, tmp_path, short_plan):
    torch.manual_seed(5)
    expected = torch.rand(3)
    threads = torch.get_num_threads()
    torch.manual_seed(5)
    build(tmp_path / "out", tmp_path / "work", stages=["detector"], plan=Plan(detector=1, pictures=8, batch=6))
    assert torch.equal(torch.rand(3), expected) and torch.get_num_threads() == threads


def test_another_seed_gives_other_weights(built, tmp_path, short_plan):
    build(tmp_path / "out", tmp_path / "work", seed=1, stages=["detector", "package"], plan=short_plan)
    assert (tmp_path / "work" / "world-10001-96.npy").exists()
    assert hashes(tmp_path / "out")["detector/model.safetensors"] != hashes(built / "out")["detector/model.safetensors"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"stages": ["detektor"]},
            f"no stage 'detektor'; the stages are {', '.join(STAGES)}",
        ),
        ({"stages": ["base"]}, "base needs the result of autoencoder"),
        ({"stages": ["package"]}, "holds no trained model yet"),
        ({"seed": -1}, "negative"),
    ],
)
def test_what_cannot_be_built_is_said(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        build(tmp_path / "out", tmp_path / "work", **options)


def test_a_work_folder_belongs_to_one_seed_and_plan(built, tmp_path, short_plan):
    for options in ({"seed": 2, "plan": short_plan}, {"plan": Plan()}):
        with pytest.raises(UserError, match="another seed or other numbers of steps"):
            build(tmp_path / "out", built / "work", **options)


def test_a_folder_of_something_else_is_not_replaced(built, tmp_path, short_plan):
    (tmp_path / "thesis.tex").write_text("all of it")
    with pytest.raises(UserError, match="something other than packaged weights"):
        build(tmp_path, built / "work", plan=short_plan)
    assert (tmp_path / "thesis.tex").read_text() == "all of it"


def test_the_stages_are_in_the_order_of_their_needs():
    trained = ("detector", "autoencoder", "reward", "reward_order", "judge", "guard", "base", "base_words", "base_order", "base_upright", "base_settle")
    assert (*trained, "flow", "flow_settle", "flow_hints", "package") == STAGES
