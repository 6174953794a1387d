"""A run's folder after a process that was killed while it entered."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from safediffusion.errors import UserError
from safediffusion.train.run_folder import FACTS, RECIPE, entered, is_run

IDENTITY = {"steps": 3, "seed": 0}


def test_a_draft_of_a_killed_process_makes_no_other_folder(tmp_path: Path) -> None:
    (tmp_path / f".{'0a' * 8}.tmp").write_text("half of a rec")
    with entered(tmp_path, "steps = 3\n", IDENTITY) as resumed:
        assert not resumed
    assert is_run(tmp_path) and not list(tmp_path.glob(".*.tmp"))


def test_a_kill_between_the_two_files_is_gone_on_with(tmp_path: Path) -> None:
    with entered(tmp_path, "steps = 3\n", IDENTITY):
        pass
    (tmp_path / RECIPE).unlink()
    with entered(tmp_path, "steps = 3\n", IDENTITY):
        assert (tmp_path / RECIPE).read_text() == "steps = 3\n"
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / FACTS).write_text(json.dumps(json.loads((tmp_path / FACTS).read_text()) | {"identity": {**IDENTITY, "steps": 9}}))  # made longer, and killed there
    with entered(tmp_path, "steps = 9\n", {**IDENTITY, "steps": 9}) as resumed:
        assert resumed and (tmp_path / RECIPE).read_text() == "steps = 9\n"


def test_what_a_user_keeps_there_is_not_taken_for_a_draft(tmp_path: Path) -> None:
    (tmp_path / ".notes.tmp").write_text("mine")
    with pytest.raises(UserError, match=r"is not empty and not the folder of a run .it holds \.notes\.tmp"), entered(tmp_path, "", IDENTITY):
        pass
    assert (tmp_path / ".notes.tmp").read_text() == "mine"
