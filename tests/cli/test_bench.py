"""`safediffusion bench`: recipes side by side on the embedded model, and what is no recipe or no model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from safediffusion.bench.clock import PARTS

SMALL = ("algorithm.prompts=1", "algorithm.group=2", "process.steps=3")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of the user's own, with a KL to the base of a fully trained model."""
    path = tmp_path_factory.mktemp("own") / "own.toml"
    path.write_text(
        'model = "nobody/elsewhere"\nsteps = 1\n[policy]\ntrain = "full"\n[reward]\nkind = "similarity"\nencoder = "pictograms"\n[algorithm]\nkind = "forward"\n'
    )
    return path


def test_two_recipes_side_by_side(command, tmp_path: Path) -> None:
    ended = command("bench", "pictograms", "--recipes", "demo,paper", "--repeats", 1, *SMALL, "--out", tmp_path / "bench")
    assert ended.code == 0, ended.err
    for words in ("demo", "paper", "images per second", "  as predicted", "of it rollout", "times as long per image as demo"):
        assert words in ended.out
    document = json.loads((tmp_path / "bench" / "bench.json").read_text())
    assert document["schema"] == 1
    assert document["versions"]["torch"] and document["machine"]["threads"] >= 1
    assert [recipe["name"] for recipe in document["recipes"]] == ["demo", "paper"]
    for recipe in document["recipes"]:
        lap = recipe["laps"][0]
        assert lap["forwards"] == lap["predicted"]
        assert set(lap["parts"]) == set(PARTS)
        assert sum(lap["parts"].values()) == pytest.approx(lap["seconds"])
        assert all(lap["parts"][part] > 0 for part in PARTS)
        assert 0 < recipe["share"] < 1.5  # a small product is not the machine's best
        assert recipe["spread"] == [recipe["images_per_second"]] * 2
        assert recipe["recipe"]["process"]["steps"] == 3
    assert document["recipes"][1]["forwards"] == 2 * 3 + 3 * 2 * 2
    with Image.open(tmp_path / "bench" / "bench.png") as picture:
        assert picture.format == "PNG" and picture.width > 600
    assert not list((tmp_path / "bench").glob(".*"))


def test_a_file_on_another_model_at_another_size(command, tiny_pipeline: Path, other: Path) -> None:
    ended = command("bench", tiny_pipeline, "--recipes", other, "--repeats", 1, "--size", 16, "--batch", 1, "--dtype", "bfloat16", *SMALL, "algorithm.times=1")
    assert ended.code == 0, ended.err
    assert "images per second" in ended.out
    assert "times as long" not in ended.out


def test_settings_alone_leave_each_recipe_its_model(command, other: Path) -> None:
    command("bench", "algorithm.prompts=1", "--recipes", other).refused("nobody/elsewhere", "not in the local cache")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("pictograms", "--recipes", "demos"), ("'demos' is no recipe", "did you mean demo?")),
        (("pictograms", "--recipes", "/nowhere/mine.toml"), ("is no recipe", "demo, paper")),
        (("pictograms", "--recipes", ","), ("no recipe to measure",)),
        (("pictograms", "--recipes", "demo,demo"), ("named twice",)),
        (("nothing",), ("'nothing' is no model",)),
        (("pictograms", "algorithm.prompt=1"), ("algorithm.prompt is not a setting", "did you mean algorithm.prompts?")),
        (("pictograms", "--size", "30"), ("image_size = 30 is not a multiple of 4",)),
        (("pictograms", "--device", "abacus"), ("'abacus' cannot be used",)),
        (("pictograms", "--repeats", "0"), ("repeats",)),
    ],
    ids=["near", "nowhere", "none", "twice", "model", "setting", "size", "device", "repeats"],
)
def test_what_cannot_be_measured(command, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    command("bench", *arguments).refused(*words)


def test_help_has_examples(command) -> None:
    ended = command("bench", "--help")
    assert ended.code == 0
    assert "safediffusion bench sd15 --recipes" in " ".join(ended.out.split())
