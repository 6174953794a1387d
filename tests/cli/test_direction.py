"""`safediffusion direction`: fitted, measured, plotted, saved, and judged as training would judge it."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from safediffusion.hub import EMBEDDED
from safediffusion.images import save_png
from safediffusion.rewards.direction import load_direction
from safediffusion.tiny.pairs import render_pairs


def test_the_embedded_direction_is_accepted(command, tmp_path: Path) -> None:
    ended = command("direction", "--compare", "compact", "--out", tmp_path)
    assert ended.code == 0
    assert "training would accept it" in ended.out
    found = json.loads((tmp_path / "direction.json").read_text())
    assert found["auc"] > 0.9
    assert {"pictograms", "compact", "skull"} <= set(found["cosines"])
    direction = load_direction(tmp_path / "direction.safetensors")
    assert direction.vector.norm() == pytest.approx(1, abs=1e-5)
    assert direction.measures["alpha"] == found["alpha"]
    for number in (1, 2):
        ElementTree.parse(tmp_path / f"figure-{number}.svg")


def test_an_encoder_without_pairs_and_prompts_is_fitted_and_not_judged(command, tmp_path: Path) -> None:
    ended = command("direction", "--encoder", EMBEDDED / "reward", "--anchors", "compact", "--out", tmp_path)
    assert ended.code == 0
    assert json.loads((tmp_path / "direction.json").read_text())["auc"] is None
    assert "nothing was measured" in ended.out


def test_pairs_of_ones_own(command, tmp_path: Path) -> None:
    pairs = render_pairs(12, seed=3)
    folder = tmp_path / "pairs"
    rows = []
    for number, prompt in enumerate(pairs.prompts):
        for kind, images in (("safe", pairs.safe), ("unsafe", pairs.unsafe)):
            save_png(images[number], folder / f"{number}-{kind}.png")
        rows.append({"prompt": prompt.text, "safe": f"{number}-safe.png", "unsafe": f"{number}-unsafe.png"})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ended = command("direction", "--pairs", folder, "--alpha", "3", "--out", tmp_path / "out")
    assert ended.code == 0
    rows = json.loads((tmp_path / "out" / "direction.json").read_text())["pair_accuracy"]
    assert {row["n"] for row in rows} == {12}
    assert rows[-1]["safe_preferred"] > rows[0]["safe_preferred"]
    Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(folder / "0-safe.png")
    command("direction", "--pairs", folder, "--out", tmp_path / "out").refused("share a size")
    (folder / "pairs.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    command("direction", "--pairs", folder, "--out", tmp_path / "out").refused('row 1 has no "safe"')
    command("direction", "--pairs", tmp_path / "none", "--out", tmp_path / "out").refused("pairs.jsonl does not exist")


@pytest.mark.slow
def test_pairs_from_the_models_own_pictures(command, tmp_path: Path) -> None:
    ended = command("direction", "--sample-from", "pictograms", "--samples", 4, "--out", tmp_path)
    assert ended.code == 0
    assert json.loads((tmp_path / "direction.json").read_text())["pair_accuracy"][0]["n"] > 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--alpha", "much"), ("--alpha should be auto or a number", "'much'")),
        (("--alpha", "-1"), ("--alpha should be auto or a number",)),
        (("--anchors", "pictogram"), ("anchors = 'pictogram' is not one of", "pictograms")),
        (("--encoder", "/nowhere"), ("/nowhere does not exist; give a local folder",)),
        (("--safe", "a.txt"), ("give --safe and --unsafe, or neither",)),
        (("--pairs", "x", "--sample-from", "pictograms"), ("give one of them",)),
    ],
)
def test_what_cannot_be_studied(command, tmp_path: Path, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    command("direction", *arguments, "--out", tmp_path / "out").refused(*words)


def test_a_direction_that_training_would_refuse_says_why(command, tmp_path: Path) -> None:
    (tmp_path / "wrong.toml").write_text('safe = ["a dangerous picture of a skull", "a knife"]\nunsafe = ["a safe picture of a ring", "two blue circles"]\n')
    ended = command("direction", "--anchors", tmp_path / "wrong.toml", "--out", tmp_path / "out")
    assert ended.code == 0
    assert "training would refuse it" in ended.out
    assert "AUC" in ended.out
    assert torch.isfinite(load_direction(tmp_path / "out" / "direction.safetensors").vector).all()
