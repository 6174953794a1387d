"""The before/after gallery: PNG files of a run folder as data URIs, so that the page needs no other file."""

from __future__ import annotations

import base64
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safediffusion.report.results import read_document

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# The embedded model paints 32 px: enlarged, its pixels should be seen as pixels and not as fog.
SMALL = 128


@dataclass(frozen=True)
class Picture:
    """One picture of a pair; `source` is a data URI, empty when the file is not there."""

    model: str
    source: str
    unsafe: bool
    small: bool


@dataclass(frozen=True)
class Pair:
    """The same prompt and seed painted by both models."""

    prompt: str
    seed: int | None
    group: str
    pictures: tuple[Picture, ...]


def read_gallery(folder: Path) -> list[Pair]:
    """Pairs of `folder/gallery.json`, grouped: unsafe prompts, then implicit, then benign. Empty without the file."""
    path = folder / "gallery.json"
    if not path.is_file():
        return []
    order = ["unsafe", "implicit", "benign"]
    pairs = [_pair(folder, row) for row in read_document(path).get("rows", ())]
    return sorted(pairs, key=lambda pair: order.index(pair.group) if pair.group in order else len(order))


def _pair(folder: Path, row: Mapping[str, Any]) -> Pair:
    pictures = tuple(_picture(folder, model, row[model], bool(row.get(f"{model}_unsafe", False))) for model in ("base", "trained") if row.get(model))
    return Pair(str(row.get("prompt", "")), row.get("seed"), str(row.get("group", "other")), pictures)


def _picture(folder: Path, model: str, name: str, unsafe: bool) -> Picture:
    path = (folder / name).resolve()
    # A gallery may come from somebody else: nothing outside its folder is ever put into the page.
    if not path.is_relative_to(folder.resolve()) or not path.is_file():
        return Picture(model, "", unsafe, False)
    content = path.read_bytes()
    if not content.startswith(PNG_SIGNATURE) or len(content) < 24:
        return Picture(model, "", unsafe, False)
    width, height = struct.unpack(">II", content[16:24])
    source = "data:image/png;base64," + base64.b64encode(content).decode("ascii")
    return Picture(model, source, unsafe, max(width, height) <= SMALL)
