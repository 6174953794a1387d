"""An evaluation: every model paints the same prompts from the same seeds, judges mark the pictures, files keep it all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safediffusion import ranks
from safediffusion.data.prompts import prompts_sha256
from safediffusion.data.screen import screen
from safediffusion.data.sets import load_set
from safediffusion.errors import UserError
from safediffusion.evaluate import pictograms
from safediffusion.evaluate.pictograms import Judges, Marks, Painted
from safediffusion.evaluate.verdict import companions, composed, kept, unsafe
from safediffusion.hub import EMBEDDED
from safediffusion.policies.latent import LatentPolicy, PolicySettings, load_policy
from safediffusion.tiny.scenes import SIZE, parse
from safediffusion.types import Prompt
from safediffusion.weights import sha256

SCHEMA = 1
# The whole UNet as it is in the folder: an adapter, even at zero, costs time.
AS_IT_IS = PolicySettings(train="full")
Advance = Callable[[str, int], None]


@dataclass(frozen=True)
class Extent:
    """How much is painted. `limit` takes the first prompts of each set; pictures of a prompt have the seeds seed, seed + 1, ..."""

    samples: int = 4
    seed: int = 0
    limit: int | None = None
    batch: int = 100  # pictures at once on each process; memory, not results

    def __post_init__(self) -> None:
        for name in ("samples", "batch", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('batch', 'batch-size')} should be at least 1, but is {value}")
        if self.seed < 0:
            raise UserError(f"--seed should be at least 0, but is {self.seed}")


@dataclass(frozen=True)
class Sets:
    """The screened prompts by group, and how many the screen refused."""

    prompts: Mapping[str, tuple[Prompt, ...]]
    refused: int


def load_sets(extent: Extent) -> Sets:
    """The test prompts. The screen runs before anything is painted."""
    prompts, refused = {}, 0
    for group, name in pictograms.SETS.items():
        screened = screen(load_set(name)[: extent.limit], unsafe=group != "safe")
        prompts[group] = screened.kept
        refused += len(screened.refused)
    return Sets(prompts, refused)


def protocol(sets: Sets, judges: Judges, extent: Extent) -> dict[str, Any]:
    """All that decides a number besides the model: two results with equal protocols may be compared."""
    return {
        "id": pictograms.PROTOCOL,
        "limit": extent.limit,
        "samples": extent.samples,
        "seed": extent.seed,
        "prompts": {group: len(prompts) for group, prompts in sets.prompts.items()},
        "prompts_sha256": {group: prompts_sha256(prompts) for group, prompts in sets.prompts.items()},
        "refused": sets.refused,
        "sampler": "ddim",
        "steps": pictograms.STEPS,
        "guidance": pictograms.GUIDANCE,
        "eta": 0.0,
        "size": SIZE,
        "detector": {"name": "pictograms", "sha256": sha256(EMBEDDED / "detector" / "model.safetensors")},
        "encoder": judges.encoder.identity,
    }


@dataclass(frozen=True)
class Findings:
    """What the judges said of each model, by its name, and the pictures themselves."""

    pictures: Mapping[str, Painted]
    marks: Mapping[str, Marks]

    @property
    def models(self) -> dict[str, dict[str, Any]]:
        return {name: _numbers(pictograms.estimates(marks)) for name, marks in self.marks.items()}

    @property
    def changes(self) -> dict[str, Any]:
        """Paired, of `trained` from `base`; empty for one model alone."""
        return _numbers(pictograms.changes(self.marks["base"], self.marks["trained"])) if len(self.marks) == 2 else {}


def find(models: Mapping[str, Path], sets: Sets, judges: Judges, extent: Extent, device: torch.device, advance: Advance) -> Findings:
    """Paint and mark with each model in turn, `base` first: the drift of the others is measured from it."""
    pictures: dict[str, Painted] = {}
    marks: dict[str, Marks] = {}
    for name, folder in models.items():
        policy = load_policy(folder, AS_IT_IS, device)
        check_size(policy, folder)
        pictures[name] = _paint(policy, sets, extent, lambda count, name=name: advance(name, count))
        reference = pictures.get("base") if name != "base" else None
        marks[name] = ranks.from_main(lambda shown=pictures[name], reference=reference: pictograms.mark(shown, judges, reference))
    return Findings(pictures, marks)


def scores(findings: Findings, judges: Judges, extent: Extent) -> Iterator[dict[str, Any]]:
    """One record per picture: what was found in it and what follows from that; null where a question has no sense."""
    for model, painted in findings.pictures.items():
        for group, prompts in painted.prompts.items():
            read = judges.detector.read(painted.images[group])
            for place, found in enumerate(read):
                number, sample = divmod(place, painted.samples)
                content = parse(prompts[number].text)
                yield {
                    "model": model,
                    "group": group,
                    "task": prompts[number].task,
                    "prompt": prompts[number].text,
                    "sample": sample,
                    "seed": extent.seed + sample,
                    "found": [{"kind": f.kind, "colour": f.colour, "x": round(f.x, 2), "y": round(f.y, 2)} for f in found],
                    "unsafe": unsafe(found),
                    "composed": composed(content, found) if group == "safe" else None,
                    "kept": kept(content, found) if companions(content) else None,
                }


def _paint(policy: LatentPolicy, sets: Sets, extent: Extent, advance: Callable[[int], None]) -> Painted:
    try:
        process, images = pictograms.sampler(policy), {}
    except ValueError as error:
        raise UserError(f"the scheduler of {policy.folder} cannot be used: {error}") from None
    at_once = max(1, extent.batch * ranks.count() // extent.samples)
    for group, prompts in sets.prompts.items():
        parts: list[Tensor] = []
        for start in range(0, len(prompts), at_once):
            chosen = prompts[start : start + at_once]
            parts.append(pictograms.paint(policy, process, chosen, extent.samples, pictograms.GUIDANCE, extent.seed, extent.batch))
            advance(len(parts[-1]))
        images[group] = torch.cat(parts)
    return Painted(sets.prompts, images, extent.samples)


def check_size(policy: LatentPolicy, folder: Path) -> None:
    side = policy.sample_shape[-1] * 2 ** (len(policy.vae.config.block_out_channels) - 1)
    if side != SIZE:
        raise UserError(
            f"{folder} paints pictures of {side} pixels, and the task pictograms reads pictures of {SIZE}: "
            "it measures models of the embedded world only, and no other task is there yet"
        )


def _numbers(estimates: Mapping[str, Any]) -> dict[str, Any]:
    return {name: estimate.as_dict() for name, estimate in estimates.items()}
