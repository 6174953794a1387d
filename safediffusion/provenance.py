"""Where a number comes from: versions, the commit of the code, and the seconds that it took."""

from __future__ import annotations

import importlib.metadata
import platform
import resource
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("safediffusion", "torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy", "pillow")


@dataclass(frozen=True)
class Seconds:
    """Wall and processor time. On a shared machine only the second says what a run costs."""

    wall: float = 0.0
    cpu: float = 0.0

    @classmethod
    def now(cls) -> Seconds:
        """The clocks of this process; only differences mean something."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        return cls(time.monotonic(), used.ru_utime + used.ru_stime)

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.wall + other.wall, self.cpu + other.cpu)

    def __sub__(self, other: Seconds) -> Seconds:
        return Seconds(self.wall - other.wall, self.cpu - other.cpu)

    def __str__(self) -> str:
        return f"{_spelled(self.wall)} ({_spelled(self.cpu)} of processor time)"


def versions() -> dict[str, str]:
    """Python and the packages that decide a number."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout that was never installed
            continue
    return found


def commit() -> str:
    """The commit of the checkout that this package is run from, with a + when files differ from it; "" for a wheel."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return ""
    try:
        asked = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
        return subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _spelled(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{int(seconds // 60)} min {int(seconds % 60)} s"
