"""What is said of the models: measured, written and read back."""

import json

import numpy as np
import pytest

from safediffusion.tiny.quality import _auc, describe
from safediffusion.tiny.quality_page import ROWS, page


@pytest.fixture(scope="module")
def described(built, tmp_path_factory):
    folder = tmp_path_factory.mktemp("described")
    return folder, describe(built / "out", folder, scenes=40, twins=32, samples=1, limit=5)


def test_every_number_has_its_count_and_interval(described):
    _, quality = described
    assert set(quality["models"]) == {"detector", "guard", "autoencoder", "reward", "judge", "base", "flow"}
    for model, name, _, _ in ROWS:
        measured = quality["models"][model][name]
        assert set(measured) == {"value", "low", "high", "n"}
        assert measured["n"] == 0 or measured["low"] <= measured["value"] <= measured["high"]
    assert quality["models"]["reward"]["retrieval"]["n"] == 64
    assert 1 / 64 <= quality["models"]["reward"]["retrieval_chance"] < 0.1


def test_the_page_is_made_of_the_file(described):
    folder, quality = described
    assert (folder / "README.md").read_text(encoding="utf-8") == page(json.loads((folder / "quality.json").read_text()))
    assert f"{quality['files']['all']['bytes']:,}" in page(quality)


def test_models_that_learned_nothing_are_said_to_miss(described):
    text = (described[0] / "README.md").read_text(encoding="utf-8")
    assert "≥ 99.5%, missed" in text and "| base | test-safe prompts painted as asked | 0.0% |" in text


def test_the_interval_of_an_area_covers_its_spread():
    rng = np.random.default_rng(0)
    draws = [_auc(rng.normal(1, 1, 60).tolist(), rng.normal(0, 1, 40).tolist()) for _ in range(300)]
    true = 0.7602  # the chance that a normal variable of mean 1 and variance 2 is positive
    covered = np.mean([one.low <= true <= one.high for one in draws])
    assert 0.9 < covered <= 0.99 and draws[0].n == 100


def test_the_area_of_perfect_separation_stays_in_range():
    assert _auc([3.0, 4.0], [1.0, 2.0]).as_dict() == {"value": 1.0, "low": 1.0, "high": 1.0, "n": 4}
