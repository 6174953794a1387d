"""Pairs for calibration from a model's own pictures: what it paints of one unsafe prompt, sorted by the detector.

Plain tuples leave this room: what a reward makes of them is no business of the judges.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from safediffusion.detectors.objects import Found, ObjectDetector
from safediffusion.errors import UserError
from safediffusion.evaluate import pictograms
from safediffusion.evaluate.verdict import companions, kept, unsafe
from safediffusion.rollout import chunks
from safediffusion.tiny.scenes import Content, parse
from safediffusion.types import Policy, Prompt

_AT_ONCE = 64  # pictures


class SampledPair(NamedTuple):
    """Pictures `(3, H, W)` of one prompt, and a harmless one of something else; `has_content` of something harmless to keep."""

    prompt: Prompt
    safe: Tensor
    unsafe: Tensor
    unrelated: Tensor
    has_content: bool


def sample_pairs(
    policy: Policy, detector: ObjectDetector, prompts: Sequence[Prompt], samples: int, seed: int, advance: Callable[[int], None] = lambda count: None
) -> list[SampledPair]:
    """A pair of each prompt of which the model paints both kinds. UserError when there is none.

    The first safe picture that keeps the prompt's harmless content stands against the first unsafe one.
    """
    process = pictograms.sampler(policy)
    sorted_pictures: list[tuple[Prompt, Content, Tensor, Tensor]] = []
    for part in chunks(len(prompts), max(1, _AT_ONCE // samples)):
        chosen = prompts[part]
        painted = pictograms.paint(policy, process, chosen, samples, pictograms.GUIDANCE, seed).split(samples)
        for prompt, images in zip(chosen, painted, strict=True):
            found, content = detector.read(images), parse(prompt.text)
            safe = next((i for i, each in enumerate(found) if _keeps(content, each)), None)
            bad = next((i for i, each in enumerate(found) if unsafe(each)), None)
            if safe is not None and bad is not None:
                sorted_pictures.append((prompt, content, images[safe], images[bad]))
        advance(len(chosen))
    pairs = []
    for prompt, content, safe_image, bad_image in sorted_pictures:
        other = next((image for _, strange, image, _ in sorted_pictures if not _words(strange) & _words(content)), None)
        if other is not None:
            pairs.append(SampledPair(prompt, safe_image, bad_image, other, bool(companions(content)) or not content.names_hazard))
    if not pairs:
        raise UserError(
            f"of {len(prompts)} unsafe prompts with {samples} pictures each the model painted both a safe and an unsafe picture of none "
            "that can be paired; raise --samples, or give pictures by --pairs"
        )
    return pairs


def _keeps(content: Content, found: Sequence[Found]) -> bool:
    return bool(found) and not unsafe(found) and kept(content, found)


def _words(content: Content) -> set[str]:
    """What is harmless in a content: an unrelated picture shares none of it."""
    return {word for item in content.items if not item.hazard for word in (item.kind, item.colour) if word}


def stacked(pairs: Sequence[SampledPair]) -> tuple[tuple[Prompt, ...], Tensor, Tensor, Tensor, Tensor]:
    """All pairs at once: prompts, three stacks `(N, 3, H, W)`, and `(N,)` bool."""
    pictures = (torch.stack([pair[place] for pair in pairs]) for place in (1, 2, 3))
    prompts = tuple(pair.prompt for pair in pairs)
    safe, bad, unrelated = pictures
    return prompts, safe, bad, unrelated, torch.tensor([pair.has_content for pair in pairs])
