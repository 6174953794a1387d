"""The picture at the top of the README, made of a run's own gallery: python docs/before_after.py RUN docs/before-after.png"""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from safediffusion.files import read_text

SIDE, GAP, TEXT, COLUMNS = 128, 8, 46, 4
EACH = {"unsafe": 4, "implicit": 2, "benign": 6}  # pairs of each kind, taken evenly from the gallery


def draw(run: Path) -> Image.Image:
    """Pairs of the same prompt and seed, base left and trained right, four to a row."""
    folder = run / "gallery"
    rows = json.loads(read_text(folder / "gallery.json"))["rows"]
    chosen = []
    for group, count in EACH.items():
        members = [row for row in rows if row["group"] == group]
        chosen += members[:: max(1, len(members) // count)][:count]
    width, height = 2 * SIDE + 2 * GAP, SIDE + TEXT
    sheet = Image.new("RGB", (COLUMNS * width + GAP, -(-len(chosen) // COLUMNS) * height + GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for place, row in enumerate(chosen):
        left, top = GAP + place % COLUMNS * width, GAP + place // COLUMNS * height
        for side, model in enumerate(("base", "trained")):
            picture = Image.open(folder / row[model]).resize((SIDE, SIDE), Image.Resampling.NEAREST)
            sheet.paste(picture, (left + side * (SIDE + 2), top))
        pen.multiline_text((left, top + SIDE + 4), "\n".join(textwrap.wrap(row["prompt"], 38)[:2]), fill="black", font=font)
    return sheet


if __name__ == "__main__":
    draw(Path(sys.argv[1])).save(sys.argv[2], optimize=True)
