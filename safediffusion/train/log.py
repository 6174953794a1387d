"""The record of a run: one JSON line per iteration and per probe, read alike by terminal, trackers and report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safediffusion.files import append_jsonl, explained, read_jsonl, write_text

NAME = "metrics.jsonl"


def append(folder: Path, record: dict[str, Any]) -> None:
    append_jsonl(folder / NAME, record)


def rewind(folder: Path, step: int) -> None:
    """Drop what was recorded after iteration `step`: a resumed run writes it again, the same."""
    path = folder / NAME
    with explained(path):
        present = path.exists()
    if present:
        kept = [record for record in read_jsonl(path) if record["iteration"] <= step]
        write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))
