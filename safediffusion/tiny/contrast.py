"""Image-text contrast for the two CLIP models: pictures come in near-twins, so that colour, place and danger must be read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel

from safediffusion.tiny.drawing import draw
from safediffusion.tiny.scenes import (
    COLOURS,
    HAZARDS,
    RELATIONS,
    SAFE_TONES,
    SHAPES,
    Content,
    Item,
    Scene,
    parse,
    sample,
    scene_for,
)


def _other(rng: np.random.Generator, options: tuple[str, ...], current: str) -> str:
    return str(rng.choice([option for option in options if option != current]))


def twin(rng: np.random.Generator, content: Content) -> Content:
    """The same sentence with one thing changed: order of a relation, a swap of colours, a colour or a kind."""
    items = list(content.items)
    if content.relation and rng.random() < 0.5:
        return replace(content, relation=RELATIONS[RELATIONS.index(content.relation) ^ 1])
    if len(items) == 2 and items[0].colour and items[1].colour and items[0].colour != items[1].colour and rng.random() < 0.5:
        swapped = (replace(items[0], colour=items[1].colour), replace(items[1], colour=items[0].colour))
        if swapped[0].kind != swapped[1].kind:
            return replace(content, items=swapped)
    if content.counted:
        return replace(content, items=items[:1] if rng.random() < 0.5 else (_changed(rng, items[0]),) * 2)
    at = int(rng.integers(len(items)))
    items[at] = _changed(rng, items[at])
    if len(items) == 2 and items[0] == items[1]:
        return replace(content, items=tuple(items), relation="")
    return replace(content, items=tuple(items))


def _changed(rng: np.random.Generator, item: Item) -> Item:
    if item.hazard:
        return Item(_other(rng, HAZARDS, item.kind)) if rng.random() < 0.5 else _shape(rng, True)
    if item.colour and rng.random() < 0.5:
        return replace(item, colour=_other(rng, COLOURS, item.colour))
    return replace(item, kind=_other(rng, SHAPES, item.kind))


def sample_twins(rng: np.random.Generator) -> tuple[tuple[str, Scene], tuple[str, Scene]]:
    """Two captioned scenes that differ in one thing; a hidden hazard's twin is the same content, safely toned."""
    caption, scene = sample(rng)
    content = parse(caption)
    if "danger" in content.tone or "hazardous" in content.tone:
        calm = replace(content, tone=str(rng.choice(("", *SAFE_TONES))))
        if not content.names_hazard:
            return (caption, scene), (calm.caption(), scene_for(rng, calm))
    other = twin(rng, content)
    return (caption, scene), (other.caption(), scene_for(rng, other))


def sample_mirrored(rng: np.random.Generator, relations: tuple[str, ...] = RELATIONS) -> tuple[tuple[str, Scene], tuple[str, Scene]]:
    """Two shapes in one of `relations`, and the same two the other way round: nothing but the order tells the captions apart."""
    first = _shape(rng, rng.random() < 0.5)
    second = _shape(rng, bool(first.colour))
    while second.kind == first.kind:
        second = _shape(rng, bool(first.colour))
    content = Content((first, second), str(rng.choice(relations)), str(rng.choice(("", "", "", *SAFE_TONES))))
    mirrored = replace(content, relation=RELATIONS[RELATIONS.index(content.relation) ^ 1])
    state = int(rng.integers(2**32))
    one, other = ((each.caption(), scene_for(np.random.default_rng(state), each)) for each in (content, mirrored))
    return one, other


def _shape(rng: np.random.Generator, coloured: bool) -> Item:
    return Item(str(rng.choice(SHAPES)), str(rng.choice(COLOURS)) if coloured else "")


Sampler = Callable[[np.random.Generator], tuple[tuple[str, Scene], tuple[str, Scene]]]


def render_twins(count: int, seed: int, sampler: Sampler = sample_twins) -> tuple[np.ndarray, list[str]]:
    """`2 count` pictures uint8 and captions, twins next to each other; pair i depends on (seed, i) alone."""
    flat = _sampled(count, seed, sampler)
    return np.stack([draw(scene) for _, scene in flat]), [caption for caption, _ in flat]


def cached_twins(folder: Path, count: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """The same, with the pictures kept in `folder` (drawing is the slow part)."""
    path = folder / f"twins-{seed}-{count}.npy"
    if not path.exists():
        pixels, captions = render_twins(count, seed)
        folder.mkdir(parents=True, exist_ok=True)
        np.save(path.with_suffix(".tmp.npy"), pixels)
        path.with_suffix(".tmp.npy").replace(path)
        return pixels, captions
    return np.load(path), [caption for caption, _ in _sampled(count, seed, sample_twins)]


def _sampled(count: int, seed: int, sampler: Sampler) -> list[tuple[str, Scene]]:
    return [one for i in range(count) for one in sampler(np.random.default_rng((seed, i)))]


def contrast_loss(model: CLIPModel, images: Tensor, tokens: Tensor, mask: Tensor, same: Tensor) -> Tensor:
    """Symmetric InfoNCE; pictures with the same caption (`same` (B, B) bool) share the target evenly."""
    image, text = _embedded(model, images, tokens, mask)
    logits = model.logit_scale.exp().clamp(max=100) * image @ text.T
    target = same.float() / same.sum(1, keepdim=True)
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))


def retrieval(model: CLIPModel, images: Tensor, tokens: Tensor, mask: Tensor, same: Tensor) -> Tensor:
    """Per picture whether its nearest caption says the same as its own, `(B,)` bool."""
    with torch.no_grad():
        image, text = _embedded(model, images, tokens, mask)
    return same[torch.arange(len(images)), (image @ text.T).argmax(1)]


def prefers_own(model: CLIPModel, images: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """Per picture whether its own caption is nearer than that of its twin, which stands next to it, `(B,)` bool."""
    with torch.no_grad():
        image, text = _embedded(model, images, tokens, mask)
    twin_of = torch.arange(len(images)) ^ 1
    return (image * text).sum(1) > (image * text[twin_of]).sum(1)


def _embedded(model: CLIPModel, images: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors `(B, D)` of pictures and of captions."""
    image = F.normalize(model.get_image_features((images - 0.5) / 0.5).pooler_output, dim=-1)
    return image, F.normalize(model.get_text_features(tokens, attention_mask=mask).pooler_output, dim=-1)
