"""The wheel: it holds all that a user without the repository needs."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT], check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_weights_recipes_templates_and_licence(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    parts = [f"tiny/weights/{part}/" for part in ("pipeline/unet", "pipeline/vae", "flow/transformer", "reward", "judge", "detector", "guard")]
    files = ["tiny/weights/hashes.json", "recipes/demo.toml", "recipes/demo-flow.toml", "recipes/paper.toml", "data/screen_terms.toml", "data/anchors/broad.toml"]
    files += [f"report/page.{ending}" for ending in ("html.j2", "css", "js")]
    for part in (*parts, *files):
        assert any(name.startswith(f"safediffusion/{part}") for name in names), part
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests/", "recipes/")) or "__pycache__" in name]
    assert wheel.stat().st_size < 24_000_000


def test_the_command_runs_from_the_wheel_outside_the_repository(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    asked = [sys.executable, "-m", "safediffusion", "generate", "pictograms", "--prompt", "a red circle", "--steps", "2", "--out", "pictures"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(asked, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (ended.returncode, len(list((tmp_path / "pictures").glob("*.png")))) == (0, 1), ended.stderr
