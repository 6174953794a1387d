"""What an evaluation measures: models, some of them under a guide, and folders of pictures that others have painted."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safediffusion.errors import UserError
from safediffusion.train import run_folder

if TYPE_CHECKING:
    import torch

    from safediffusion.evaluate.painter import Painter
    from safediffusion.evaluate.pictures import Stored
    from safediffusion.evaluate.run import Extent, Plan
    from safediffusion.guided import GuideSettings

Names = Path | str | Sequence[Path | str]


def locate(name: str) -> Path:
    """The diffusers folder of a model: a folder, a run folder (its model), a hub id, which org/name@REVISION pins, `pictograms` or `pictograms-flow`."""
    from safediffusion.hub import EMBEDDED_MODELS, resolve_model

    folder = Path(name).expanduser()
    if name not in EMBEDDED_MODELS and run_folder.is_run(folder):
        if not (folder / run_folder.MODEL / "model_index.json").is_file():
            raise UserError(f"{name} is a run that has no model yet; finish it by running its command again, or write one with `safediffusion export`")
        return folder / run_folder.MODEL
    name, _, revision = (name, "", "") if folder.exists() else name.partition("@")
    return resolve_model(name, revision or None)


@dataclass(frozen=True)
class Subjects:
    """What is measured, by its name in results.json."""

    names: Mapping[str, Path | str]
    painters: Mapping[str, Painter]
    given: Mapping[str, Mapping[str, Sequence[Stored | None]]]
    planned: tuple[Plan, ...]

    @cached_property
    def described(self) -> dict[str, dict[str, Any]]:
        """Which weights under which guide, or which pictures, each of them is."""
        told = {name: each.description for name, each in self.painters.items()}
        told |= {name: {"pipeline": "pictures", "sha256": {task: _digest(each) for task, each in stored.items()}} for name, stored in self.given.items()}
        return {name: told[name] for name in self.names}

    @property
    def histories(self) -> dict[str, Path]:
        """The run folder of each model that a run has made."""
        folders = {name: each.variant.folder for name, each in self.painters.items()}
        return {name: each.parent for name, each in folders.items() if each.name == run_folder.MODEL and run_folder.is_run(each.parent)}


def subjects(
    model: Names,
    against: Path | str | None,
    images: Sequence[Path | str],
    planned: tuple[Plan, ...],
    guide: GuideSettings | None,
    device: torch.device,
    extent: Extent,
) -> Subjects:
    """Who paints, and what was painted elsewhere. A guide steers the models under test, and never `against`."""
    from safediffusion.evaluate.given import given
    from safediffusion.evaluate.painter import Painter
    from safediffusion.policies.variant import variant

    models = [model] if isinstance(model, (str, Path)) else list(model)
    names = _named(models, against, images, guide is not None)
    painters = {name: Painter(variant(str(each), locate), held=extent.held) for name, each in names.items() if each not in images}
    changed = [*extent.held.changed, *(["seed"] if extent.seed is not None else [])]
    if changed and not painters:
        asked = " and ".join(f"--{name.replace('_', '-')}" for name in changed)
        raise UserError(f"{asked} is of a model that paints, and --images are painted already; name a MODEL, or leave it out")
    if guide is not None:
        if not models:
            raise UserError("--guide steers a model while it paints, and --images are painted already; name a MODEL, or leave --guide out")
        painters = {name: each if against is not None and name == "base" else _under(guide, each, device) for name, each in painters.items()}
    folders = {name: given(Path(each), planned, extent) for name, each in names.items() if each in images}
    agreed = _agreed(planned, {name: plans for name, (plans, _) in folders.items()}, bool(painters))
    return Subjects(names, painters, {name: stored for name, (_, stored) in folders.items()}, agreed)


def _under(guide: GuideSettings, painter: Painter, device: torch.device) -> Painter:
    from safediffusion.guided import described, guided

    return replace(painter, guide=described(guide), guided=partial(guided, options=guide, device=device))


def _named(models: Sequence[Path | str], against: Path | str | None, images: Sequence[Path | str], guided: bool) -> dict[str, Path | str]:
    """What is measured by its name in results.json: `base` is what changes are counted from, `trained` a single other one; several have their own names."""
    from safediffusion.hub import EMBEDDED_MODELS

    every = [*models, *images]
    if not every:
        raise UserError("MODEL is missing: name what to measure, such as `pictograms`, or give a folder of pictures by --images")
    if len(set(map(str, every))) < len(every):
        raise UserError("the same model is named twice; name each once")
    named: dict[str, Path | str] = {} if against is None else {"base": against}
    if len(every) == 1:
        return named | {"trained" if named or guided or str(every[0]) not in EMBEDDED_MODELS else "base": every[0]}
    for each in every:
        short = Path(str(each)).name or str(each)
        named[short if short not in named else str(each)] = each
    return named


def _agreed(planned: tuple[Plan, ...], given: Mapping[str, tuple[Plan, ...]], painting: bool) -> tuple[Plan, ...]:
    """The plans that all share; UserError where folders of pictures do not fit what the others paint."""
    every = [*([planned] if painting else []), *given.values()]
    for other in every[1:]:
        for one, two in zip(every[0], other, strict=True):
            if one.rows.sha256 != two.rows.sha256:
                raise UserError(f"{one.task.name}: not all pictures given say which prompts they are of; write a manifest.csv for each folder, or measure each alone")
            if one.task.painting.samples != two.task.painting.samples:
                raise UserError(
                    f"{one.task.name}: the pictures given are not as many for each prompt as the others ({two.task.painting.samples} and {one.task.painting.samples}); "
                    "measure them on their own, or set --samples"
                )
    return every[0]


def _digest(stored: Sequence[Stored | None]) -> str:
    return hashlib.sha256("".join("-" if each is None else each.sha256 for each in stored).encode()).hexdigest()
