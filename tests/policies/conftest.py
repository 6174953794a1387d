"""Fixtures of the policies' tests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def edited(tiny_pipeline: Path, tmp_path: Path) -> Callable[..., Path]:
    """`edited(file, key=value)` is a copy of the tiny pipeline whose JSON `file` has other values for some keys."""

    def edit(file: str, **changes: Any) -> Path:
        folder = Path(shutil.copytree(tiny_pipeline, tmp_path / "edited"))
        config = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**config, **changes}))
        return folder

    return edit
