"""What `import safediffusion` offers."""

import tomllib
from pathlib import Path

import pytest

import safediffusion


def test_every_public_name_is_there() -> None:
    assert all(getattr(safediffusion, name) is not None for name in safediffusion.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        _ = safediffusion.trian


def test_the_version_is_that_of_the_package() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert project["version"] == safediffusion.__version__
