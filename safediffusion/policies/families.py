"""Which families of models there are."""

from __future__ import annotations

from pathlib import Path

from safediffusion.errors import UserError
from safediffusion.hub import read_index
from safediffusion.policies.family import Family
from safediffusion.policies.flux import Flux
from safediffusion.policies.pipeline import read_config
from safediffusion.policies.sd3 import StableDiffusion3
from safediffusion.policies.sdxl import StableDiffusionXL
from safediffusion.policies.stable_diffusion import StableDiffusion

FAMILIES: dict[str, type[Family]] = {each.pipeline: each for each in (StableDiffusion, StableDiffusionXL, StableDiffusion3, Flux)}


def find_family(folder: Path) -> Family:
    """That of a diffusers folder, by its model_index.json. UserError for a pipeline that is not supported, or made of other parts."""
    index = read_index(folder)
    kind = FAMILIES.get(index["_class_name"])
    if kind is None:
        raise UserError(f"{folder} is a {index['_class_name']}; supported are {', '.join(FAMILIES)}")
    for part, supported in kind.parts.items():
        found = (index.get(part) or [None, None])[1]
        if found not in (supported, f"{supported}Fast") and not (found is None and part in kind.optional):
            raise UserError(f"{folder / 'model_index.json'} has {found} as {part}; supported is {supported}")
    for part in kind.optional:
        encoder = part.replace("tokenizer", "text_encoder")
        if (index.get(encoder) or [None])[0] and not (index.get(part) or [None])[0]:
            raise UserError(f"{folder / 'model_index.json'} has a {encoder} and no {part}; fetch the model again, or set both to [null, null]")
    return kind(index, read_config(folder / kind.network))
