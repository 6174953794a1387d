"""The real command, run in this process for speed; `shell` runs it as a user does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from safediffusion.cli.app import main

RECIPE = """
model = "pictograms"
steps = 2
[policy]
train = "full"
[process]
steps = 2
[reward]
kind = "similarity"
encoder = "pictograms"
[algorithm]
kind = "forward"
prompts = 2
group = 2
times = 1
[probe]
every = 1
prompts = 2
samples = 2
patience = 0
[optimizer]
lr = 1e-4
[log]
checkpoint_every = 1
"""


@dataclass(frozen=True)
class Ended:
    """What a command left: its exit code and its words."""

    code: int
    out: str
    err: str

    def refused(self, *words: str) -> None:
        """Exit code 2 and one sentence that says all of `words`."""
        assert self.code == 2, self.err
        last = self.err.rstrip("\n").split("\n")[-1]
        assert last.startswith("error: "), self.err
        assert all(word in last for word in words), self.err
        assert "Traceback" not in self.err


Command = Callable[..., Ended]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*arguments: object) -> Ended:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return Ended(code, said.out, said.err)

    return run


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training of two iterations of four pictures, with probes."""
    path = tmp_path_factory.mktemp("recipe") / "quick.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="session")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run; copy it before anything is written there."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert main(["train", str(recipe), "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may change."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture(scope="session")
def shell() -> Callable[..., subprocess.CompletedProcess[str]]:
    """A process of its own; `before` are shell commands that prepare the machine, in a mount namespace of their own."""

    def run(*arguments: object, before: str = "", environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        asked = [sys.executable, "-m", "safediffusion", *map(str, arguments)]
        if before:
            asked = ["unshare", *([] if os.geteuid() == 0 else ["-r"]), "-m", "sh", "-ec", f'{before}\nexec "$@"', "sh", *asked]
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
        return subprocess.run(asked, capture_output=True, text=True, env=variables, timeout=600)

    return run


@pytest.fixture(scope="session")
def mounts() -> None:
    """Skips where a test may not mount a small or read-only disk."""
    asked = ["unshare", *([] if os.geteuid() == 0 else ["-r"]), "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    if shutil.which("unshare") is None or subprocess.run(asked, capture_output=True).returncode:
        pytest.skip("no mount namespaces on this machine")
