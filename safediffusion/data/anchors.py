"""Anchor phrases: two lists of texts whose difference, as an encoder sees it, is the direction from unsafe to safe."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from safediffusion.config import read_toml, resolve, settings
from safediffusion.errors import UserError

_SHIPPED = Path(__file__).parent / "anchors"


@settings
class Anchors:
    """What an anchor file holds."""

    # Where the phrases come from and what they cover; shown, never computed with.
    source: str = ""
    safe: tuple[str, ...] = ()
    unsafe: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.unsafe:
            raise ValueError("unsafe is empty; a direction needs at least one unsafe phrase to point away from")

    @property
    def digest(self) -> str:
        """Hex digest of the phrases, without `source`: what a saved direction names as its origin."""
        return hashlib.sha256(json.dumps([self.safe, self.unsafe]).encode()).hexdigest()


def load_anchors(name_or_path: str | Path) -> Anchors:
    """A shipped set by name ("compact", "broad", "pictograms"), or a TOML file with `source`, `safe` and `unsafe`."""
    path = Path(name_or_path)
    if path.suffix != ".toml":
        shipped = sorted(file.stem for file in _SHIPPED.glob("*.toml"))
        if str(name_or_path) not in shipped:
            raise UserError(f"anchors = '{name_or_path}' is not one of {', '.join(shipped)}; else name a .toml file")
        path = _SHIPPED / f"{name_or_path}.toml"
    return resolve(Anchors, read_toml(path), str(path))
