"""Pictures for prompts, each a function of (prompt, seed) alone, with a manifest that a second command goes on from."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safediffusion.errors import UserError
from safediffusion.files import append_jsonl, check_writable, read_jsonl
from safediffusion.policies.settings import EXACT, Held
from safediffusion.types import Policy, Process, Prompt

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from safediffusion.guided import GuideSettings
    from safediffusion.policies.variant import Variant
    from safediffusion.progress import Bars

MANIFEST = "manifest.jsonl"


@dataclass(frozen=True)
class Setting:
    """How pictures are painted; all of it is part of a picture's identity. Without `guidance` it is what is usual for the model's family."""

    steps: int = 25
    guidance: float | None = None
    size: int | None = None
    held: Held = EXACT
    guide: GuideSettings | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"--steps should be at least 1, but is {self.steps}")
        if self.guidance is not None and not 1 <= self.guidance < float("inf"):
            raise UserError(f"--guidance should be a finite number of at least 1 (no guidance), but is {self.guidance:g}")

    @property
    def facts(self) -> dict[str, Any]:
        """For a picture's identity and its line of the manifest; without a guide as if there were none."""
        steered = {} if self.guide is None else {"guide": asdict(self.guide)}
        return {"steps": self.steps, "guidance": self.guidance, "size": self.size, "dtype": self.held.dtype} | self.held.facts | steered


@dataclass(frozen=True)
class Item:
    """One picture to be: its prompt, its seed, its place in the manifest."""

    prompt: str
    seed: int
    key: str

    @property
    def file(self) -> str:
        words = re.sub(r"[^a-z0-9]+", "-", self.prompt.lower()).strip("-")[:40].strip("-")
        return f"{words or 'picture'}-{self.seed}-{self.key[:8]}.png"


@dataclass(frozen=True)
class Generated:
    """What a generation did."""

    painted: int
    there_before: int
    refused: int


def generate(
    model: Variant,
    prompts: Sequence[Prompt],
    out: Path,
    *,
    setting: Setting,
    seed: int,
    samples: int,
    batch: int = 0,
    device: torch.device,
    progress: Bars,
) -> Generated:
    """Screen the prompts, then write a PNG and a line of the manifest for each picture that is not there yet.

    `batch` pictures at once on each process, 0 for as many as fit; several share the painting, and the main one writes.
    """
    from safediffusion import ranks
    from safediffusion.data.screen import screen
    from safediffusion.guided import guided
    from safediffusion.policies.autoencoder import cell
    from safediffusion.policies.families import find_family
    from safediffusion.process.scheduler import of_folder
    from safediffusion.rollout import painted

    screened = screen(prompts)
    if not screened.kept:
        raise UserError(f"the prompt screen refused all {len(screened.refused)} prompts; nothing was painted")
    ranks.from_main(lambda: check_writable(out))
    guidance = find_family(model.folder).guidance if setting.guidance is None else setting.guidance
    setting = replace(setting, guidance=guidance)
    identity = json.dumps([model.description, setting.facts], sort_keys=True)
    texts = dict.fromkeys(prompt.text for prompt in screened.kept)
    items = [_item(text, seed + k, identity) for text in texts for k in range(samples)]
    there = ranks.from_main(lambda: {row.get("key") for row in (read_jsonl(out / MANIFEST) if (out / MANIFEST).is_file() else [])})
    missing = ranks.from_main(lambda: [item for item in items if item.key not in there or not (out / item.file).is_file()])
    if missing:
        task = progress.add_task("painting", total=len(items), completed=len(items) - len(missing))
        said = [*dict.fromkeys(item.prompt for item in missing), getattr(setting.guide, "concept", "")]
        policy = model.load(device, setting.held.settings(image_size=setting.size), said)
        policy.encode.warn_of_long([item.prompt for item in missing])
        process = of_folder(policy.folder, policy.scheduler_config, setting.steps, policy.tokens(), eta=0.0)
        painter = policy if setting.guide is None else guided(policy, setting.guide, device)
        pixels = math.prod(policy.sample_shape[1:]) * cell(policy.vae) ** 2
        for part, images in painted(len(missing), pixels, batch, lambda which: _paint(painter, process, [missing[i] for i in which], guidance)):
            if ranks.is_main():
                _write(missing[part], images, setting, out, there)
            progress.advance(task, len(images))
    return Generated(len(missing), len(items) - len(missing), len(screened.refused))


def _item(text: str, seed: int, identity: str) -> Item:
    return Item(text, seed, hashlib.sha256(json.dumps([text, seed, identity]).encode()).hexdigest())


def _paint(policy: Policy, process: Process, items: Sequence[Item], guidance: float) -> Tensor:
    """Pictures `(B, 3, H, W)` on the CPU."""
    import torch

    from safediffusion.rollout import walk
    from safediffusion.seeds import noise_for

    with torch.no_grad():
        condition = policy.encode([item.prompt for item in items])
        start = noise_for([(item.prompt, item.seed) for item in items], policy.sample_shape).to(condition.device)
        clean = walk(policy, process, condition, start, guidance).clean
        return policy.decode(clean).cpu()


def _write(items: Sequence[Item], images: Tensor, setting: Setting, out: Path, there: set[Any]) -> None:
    from safediffusion.images import save_png

    for item, image in zip(items, images, strict=True):
        save_png(image, out / item.file)
        if item.key not in there:  # its line is there and only its file was removed
            append_jsonl(out / MANIFEST, {"key": item.key, "file": item.file, "prompt": item.prompt, "seed": item.seed, **setting.facts})
