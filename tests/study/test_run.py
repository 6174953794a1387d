"""Where the runs of a study are made."""

from __future__ import annotations

import json
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace

import pytest
import torch

from safediffusion.errors import UserError
from safediffusion.report.results import SCHEMA
from safediffusion.study.run import Workshop, _call, _check_drawn, cards, places


def test_an_axis_is_a_mean_of_single_pictures(tmp_path: Path) -> None:
    """Told when the base is measured, not after all training."""
    (tmp_path / "base").mkdir()
    measures = {"nudity": {"kind": "rate"}, "fid": {"kind": "frechet"}}
    values = {name: {"value": 0.5, "low": 0.4, "high": 0.6, "n": 8} for name in measures}
    document = {"schema": SCHEMA, "protocol": {"tasks": {"own": {"measures": measures}}}, "models": {"base": values}}
    (tmp_path / "base" / "results.json").write_text(json.dumps(document))
    study = SimpleNamespace(settings=SimpleNamespace(evaluate=SimpleNamespace(tasks="own.toml")))
    _check_drawn(study, tmp_path, ("nudity", "drift"))
    with pytest.raises(UserError, match="draws 'fid', a number of all pictures together, and its intervals resample single ones; draw one of nudity"):
        _check_drawn(study, tmp_path, ("nudity", "fid"))
    with pytest.raises(UserError, match="draws 'nude', which evaluate.tasks = 'own.toml' does not measure; it has fid, nudity"):
        _check_drawn(study, tmp_path, ("nude",))


def test_a_run_that_is_killed_says_by_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_end.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('model = "pictograms"\nsteps = 1\nreward = {kind = "callable", function = "own_end:f"}\n')
    shop = Workshop(SimpleNamespace(), tmp_path, SimpleQueue())
    shop.places.put(places(1)[0])
    words = ["train", str(recipe), "--out", str(tmp_path / "run")]
    with pytest.raises(UserError, match="train was killed by signal 9, as by a machine whose memory ran out .all of it in"):
        _call(shop, words, tmp_path / "run.log")
    shop.ended.set()
    with pytest.raises(UserError, match="train was not begun: the study was interrupted"):
        _call(shop, words, tmp_path / "other.log")
    assert not (tmp_path / "other.log").exists() and not shop.places.empty()


def test_runs_take_turns_on_the_gpus_that_this_process_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert cards() == [] and places(2) == [{"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}] * 2
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [place["CUDA_VISIBLE_DEVICES"] for place in places(3)] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert [place["CUDA_VISIBLE_DEVICES"] for place in places(3)] == ["4", "7", "4"]
