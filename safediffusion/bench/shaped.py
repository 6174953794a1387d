"""Models that have the shapes of known ones and random weights: what they paint means nothing, what they cost is real."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safediffusion.cost.blueprints import BLUEPRINTS, CLIP_L, Blueprint, write_configs
from safediffusion.files import explained
from safediffusion.hub import cache_folder
from safediffusion.policies.families import FAMILIES
from safediffusion.policies.pipeline import load_empty, part_class, replaced


@dataclass(frozen=True)
class Shape:
    """A pipeline, and the CLIP that rewards it: configs of its two towers and the width of its embeddings."""

    pipeline: Blueprint
    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    projection: int


_CLIP = {
    "text": CLIP_L,
    "vision": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 224, "patch_size": 14},
    "projection": 768,
}
# Rewarded by CLIP ViT-L/14, all of them.
SHAPES = {name: Shape(blueprint, **_CLIP) for name, blueprint in BLUEPRINTS.items()}


def shaped(name: str) -> Path | None:
    """The folder of the shaped model of that name, made on first use in the user's cache; None for a name that is no shape.

    Optional parts are left out: SD3.5 is measured without T5, as its pipeline allows.
    """
    if name not in SHAPES:
        return None
    shape = SHAPES[name]
    optional = FAMILIES[shape.pipeline.pipeline].optional
    parts = {part: config for part, config in shape.pipeline.parts.items() if part not in optional}
    shape = replace(shape, pipeline=replace(shape.pipeline, parts=parts))
    digest = hashlib.sha256(json.dumps(asdict(shape), sort_keys=True).encode()).hexdigest()[:8]
    return write_shaped(cache_folder() / f"{name}-{digest}", shape)


def write_shaped(folder: Path, shape: Shape) -> Path:
    """`folder`/pipeline, a diffusers folder, and `folder`/reward, a CLIPModel, both at random weights from seed 0.

    Weights lie in half precision and are trained in float32. SD1.5's takes a minute, 4 GB of memory while it is made and
    3 GB of disk; FLUX's 48 GB and 35 GB. A folder that is there already is left as it is.
    """
    if (folder / "pipeline" / "model_index.json").is_file():
        return folder
    import torch

    with explained(folder), replaced(folder) as new, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _write(new, shape)
    return folder


def _write(folder: Path, shape: Shape) -> None:
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # one per part of the model, each for a file
    pipeline = folder / "pipeline"
    write_configs(pipeline, shape.pipeline)
    for part, kind in FAMILIES[shape.pipeline.pipeline].parts.items():
        if part in shape.pipeline.parts:
            load_empty(part_class(part, kind), pipeline / part).half().save_pretrained(pipeline / part)
    tokenizer = CLIPTokenizer.from_pretrained(pipeline / "tokenizer")
    ends = {f"{end}_token_id": getattr(tokenizer, f"{end}_token_id") for end in ("bos", "eos", "pad")}
    clip = CLIPModel(CLIPConfig(text_config={**shape.text, **ends}, vision_config=dict(shape.vision), projection_dim=shape.projection))
    clip.half().save_pretrained(folder / "reward")
    tokenizer.save_pretrained(folder / "reward")
    logging.enable_progress_bar()
