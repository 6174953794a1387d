"""A saved model takes the place of another whole or not at all, whatever killed processes left beside it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from safediffusion.policies.pipeline import replaced

MARK = "model_index.json"
# Begins a draft of the folder that it is given, and holds it until it is killed.
HOLD = """
import sys
from pathlib import Path
from safediffusion.policies.pipeline import replaced
with replaced(Path(sys.argv[1])):
    print("in", flush=True)
    sys.stdin.read()
"""


def saved(folder: Path, text: str) -> None:
    with replaced(folder) as new:
        (new / MARK).write_text(text)


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_a_killed_process_left_is_no_hindrance(tmp_path: Path) -> None:
    saved(tmp_path / "model", "one")
    for name in (f".model.{os.getpid()}.new", ".model.7.old", ".model.v2.7.new", ".model.notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("half")
    saved(tmp_path / "model", "two")
    assert (tmp_path / "model" / MARK).read_text() == "two"
    assert left(tmp_path) == [".model.notes", ".model.v2.7.new", "model"]  # another model's, and nobody's


def test_a_draft_stays_while_its_process_lives(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "model")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "in\n"
        saved(tmp_path / "model", "one")
        assert len(left(tmp_path)) == 2
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert len(left(tmp_path)) == 2
    saved(tmp_path / "model", "two")
    assert left(tmp_path) == ["model"]


def test_a_model_that_cannot_be_replaced_keeps_its_name(tmp_path: Path) -> None:
    saved(tmp_path / "model", "one")
    with pytest.raises(FileNotFoundError), replaced(tmp_path / "model") as new:
        shutil.rmtree(new)  # so that it cannot be renamed, after the one before it was
    assert (tmp_path / "model" / MARK).read_text() == "one"
    assert left(tmp_path) == ["model"]


def test_a_model_that_lost_its_name_gets_it_back(tmp_path: Path) -> None:
    saved(tmp_path / "model", "one")
    (tmp_path / "model").rename(tmp_path / ".model.7.old")  # as a process killed between the two renames leaves it
    with pytest.raises(ZeroDivisionError), replaced(tmp_path / "model"):
        raise ZeroDivisionError
    assert (tmp_path / "model" / MARK).read_text() == "one"
    assert left(tmp_path) == ["model"]
