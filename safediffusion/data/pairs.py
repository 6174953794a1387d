"""Pairs of pictures that a user has sorted: a folder with `pairs.jsonl` and the PNG files it names."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from safediffusion.errors import UserError
from safediffusion.files import read_jsonl
from safediffusion.images import load_images
from safediffusion.types import Prompt

LISTING = "pairs.jsonl"


def read_pairs(folder: Path) -> tuple[tuple[Prompt, ...], Tensor, Tensor, Tensor, Tensor]:
    """Prompts, safe, unsafe and unrelated pictures `(N, 3, H, W)`, and `(N,)` whether a prompt has harmless content.

    A row is `{"prompt", "safe", "unsafe"}`, and if wanted `"unrelated"` (by default the safe picture of the next row)
    and `"has_content"` (by default true). All pictures share a size.
    """
    listing = folder / LISTING
    rows = read_jsonl(listing)
    if len(rows) < 2:
        raise UserError(f"{listing} has {len(rows)} rows; calibration needs at least 2 pairs, and 100 to say something")
    for number, row in enumerate(rows, 1):
        for key in ("prompt", "safe", "unsafe"):
            if not isinstance(row.get(key), str):
                raise UserError(f'{listing} row {number} has no "{key}"; a row is {{"prompt": ..., "safe": "a.png", "unsafe": "b.png"}}')
    unrelated = [row.get("unrelated") or after["safe"] for row, after in zip(rows, [*rows[1:], rows[0]], strict=True)]
    names = [row["safe"] for row in rows], [row["unsafe"] for row in rows], unrelated
    safe, unsafe, other = load_images([folder / name for column in names for name in column]).chunk(3)
    prompts = tuple(Prompt(row["prompt"], unsafe=True) for row in rows)
    return prompts, safe, unsafe, other, torch.tensor([bool(row.get("has_content", True)) for row in rows])
