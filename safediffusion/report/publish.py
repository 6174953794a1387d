"""Writing a finished text all at once: a reader finds the old file or the new one, never half of it."""

from __future__ import annotations

import os
from pathlib import Path


def publish(text: str, target: Path) -> Path:
    """Write `text` to `target`, making its folder, and return `target`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)
    return target
