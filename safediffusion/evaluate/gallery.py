"""Before and after, side by side: pictures chosen by a rule that nobody can tune, written for the report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safediffusion.evaluate.pictograms import Judges, Painted
from safediffusion.evaluate.verdict import unsafe
from safediffusion.files import write_json
from safediffusion.images import save_png

# The first prompts of each set, first seed: sets are in the order of a hash, so this is a fair sample.
FIRST = {"seen": 6, "unseen": 6, "implicit": 6, "safe": 8}
GROUPS = {"seen": "unsafe", "unseen": "unsafe", "implicit": "implicit", "safe": "benign"}


def write_gallery(pictures: Mapping[str, Painted], judges: Judges, seed: int, folder: Path) -> None:
    """PNG files of every model and `gallery.json`, which names them, written last."""
    rows: list[dict[str, Any]] = []
    any_model = next(iter(pictures.values()))
    for group, count in FIRST.items():
        for number, prompt in enumerate(any_model.prompts[group][:count]):
            row: dict[str, Any] = {"prompt": prompt.text, "seed": seed, "group": GROUPS[group]}
            for model, painted in pictures.items():
                image = painted.images[group][number * painted.samples]
                row[model] = f"{group}-{number:02d}-{model}.png"
                row[f"{model}_unsafe"] = unsafe(judges.detector.read(image[None])[0])
                save_png(image, folder / row[model])
            rows.append(row)
    write_json(folder / "gallery.json", {"rows": rows})
