"""What each network of the embedded world is trained on. Every stage is a loss; `fit` does the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel

from safediffusion.detectors.hazards import HazardDetector
from safediffusion.detectors.objects import CELL, GRID, ObjectDetector
from safediffusion.tiny.drawing import draw
from safediffusion.tiny.scenes import COLOURS, HAZARDS, KINDS, RELATIONS, Scene, parse, sample

_BACKGROUND_COLOUR = len(COLOURS)
_UNPROMPTED = 0.1  # share of pictures shown without their caption: what classifier-free guidance departs from


@dataclass(frozen=True)
class World:
    """Rendered pictures uint8 `(N, 32, 32, 3)` with captions and scenes."""

    pixels: np.ndarray
    captions: tuple[str, ...]
    scenes: tuple[Scene, ...]

    def images(self, index: Tensor) -> Tensor:
        """Float `(B, 3, 32, 32)` in [0, 1]."""
        return torch.from_numpy(self.pixels[index.numpy()]).permute(0, 3, 1, 2).float() / 255


def render_world(count: int, seed: int) -> World:
    """`count` pictures; picture i depends on (seed, i) alone."""
    captions, scenes = zip(*(sample(np.random.default_rng((seed, i))) for i in range(count)), strict=True)
    return World(np.stack([draw(scene) for scene in scenes]), captions, scenes)


def cached_world(folder: Path, count: int, seed: int) -> World:
    """The same, with the pictures kept in `folder` (drawing is the slow part)."""
    path = folder / f"world-{seed}-{count}.npy"
    if not path.exists():
        world = render_world(count, seed)
        folder.mkdir(parents=True, exist_ok=True)
        np.save(path.with_suffix(".tmp.npy"), world.pixels)
        path.with_suffix(".tmp.npy").replace(path)
        return world
    captions, scenes = zip(*(sample(np.random.default_rng((seed, i))) for i in range(count)), strict=True)
    return World(np.load(path), captions, scenes)


def detector_targets(scenes: Sequence[Scene]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Heat `(N, 8, 8)`, and per cell the kind, colour (long) and offset `(N, 2, 8, 8)` of the nearest object."""
    count = len(scenes)
    heat = torch.zeros(count, GRID, GRID)
    kind, colour = torch.zeros(count, GRID, GRID, dtype=torch.long), torch.full((count, GRID, GRID), _BACKGROUND_COLOUR)
    offset = torch.zeros(count, 2, GRID, GRID)
    rows, columns = torch.meshgrid(torch.arange(GRID) + 0.5, torch.arange(GRID) + 0.5, indexing="ij")
    for i, scene in enumerate(scenes):
        for thing in scene.objects:
            dx, dy = thing.x / CELL - columns, thing.y / CELL - rows
            warmth = torch.exp(-(dx.square() + dy.square()) / 0.72)
            nearest = warmth > heat[i]
            heat[i] = torch.where(nearest, warmth, heat[i])
            kind[i][nearest] = KINDS.index(thing.kind)
            colour[i][nearest] = COLOURS.index(thing.colour) if thing.colour else _BACKGROUND_COLOUR
            offset[i, 0][nearest], offset[i, 1][nearest] = dx[nearest], dy[nearest]
    return heat, kind, colour, offset


def detector_loss(detector: ObjectDetector, images: Tensor, targets: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    heat, kind, colour, offset = targets
    said_heat, said_kind, said_colour, said_offset = detector.forward(images)
    near = (heat > 0.2).float()
    total = near.sum().clamp(min=1)
    loss = 4 * F.binary_cross_entropy_with_logits(said_heat, heat)
    loss = loss + (F.cross_entropy(said_kind, kind, reduction="none") * near).sum() / total
    loss = loss + (F.cross_entropy(said_colour, colour, reduction="none") * near).sum() / total
    return loss + (F.smooth_l1_loss(said_offset, offset, reduction="none").sum(1) * near).sum() / total


def hazard_targets(scenes: Sequence[Scene]) -> Tensor:
    """1 for each kind of hazard that is in a scene, `(N, 6)`."""
    return torch.tensor([[float(any(thing.kind == kind for thing in scene.objects)) for kind in HAZARDS] for scene in scenes])


def hazard_loss(guard: HazardDetector, images: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy on softened targets: what guards in training must not be so sure that its gradient vanishes."""
    return F.binary_cross_entropy_with_logits(guard.forward(images), 0.01 + 0.98 * targets)


def worn(images: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures as a young model might paint them: some blurred, all with a little noise and tint."""
    count = len(images)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    share = torch.rand(count, 1, 1, 1, generator=generator) * (torch.rand(count, 1, 1, 1, generator=generator) < 0.5)
    noise = torch.randn(images.shape, generator=generator) * torch.rand(count, 1, 1, 1, generator=generator) * 0.06
    tint = torch.randn(count, 3, 1, 1, generator=generator) * 0.02
    return (torch.lerp(images, blurred, share) + noise + tint).clamp(0, 1)


def autoencoder_loss(vae: AutoencoderKL, images: Tensor, generator: torch.Generator) -> Tensor:
    x = images * 2 - 1
    posterior = vae.encode(x).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator)
    rebuilt = vae.decode(posterior.mean + posterior.std * noise).sample
    error = rebuilt - x
    return error.abs().mean() + error.square().mean() + 5e-4 * posterior.kl().mean() / posterior.mean[0].numel()


def denoising_loss(
    unet: UNet2DConditionModel, text_encoder: CLIPTextModel, alphas: Tensor, latents: Tensor, tokens: Tensor, empty: Tensor, generator: torch.Generator
) -> Tensor:
    """Epsilon prediction (DDPM, arXiv 2006.11239) on latents of unit scale `(B, 4, 8, 8)`; `empty` (1, L) is the empty caption.

    Times are stratified over the batch, which calms the loss, and lean towards noise, where the layout is decided.
    """
    count = len(latents)
    noise = torch.randn(latents.shape, generator=generator)
    quantiles = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    times = (1000 * quantiles**0.85).long().clamp(max=999)
    alpha = alphas[times][:, None, None, None]
    noised = (alpha.sqrt() * latents + (1 - alpha).sqrt() * noise).contiguous(memory_format=torch.channels_last)
    shown = torch.where(torch.rand(count, 1, generator=generator) < _UNPROMPTED, empty, tokens)
    predicted = unet(noised, times, text_encoder(shown).last_hidden_state).sample
    return (predicted - noise).square().mean()


_PLACES = 4  # left, right, above, below: as RELATIONS has them


class LayoutReader(nn.Module):
    """A text encoder that says at its last four positions, which no caption reaches, what stands left, right, above, below.

    The heads are thrown away; what stays is that the four states differ by place, so that a place can attend to its own.
    """

    def __init__(self, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        width = text_encoder.config.hidden_size
        self.kind, self.colour = nn.Linear(width, len(KINDS) + 1), nn.Linear(width, len(COLOURS) + 1)


def layout_targets(captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Kind and colour, each `(N, 4)` long, that a caption puts at each place; one past the last where it says nothing."""
    kinds = torch.full((len(captions), _PLACES), len(KINDS))
    colours = torch.full((len(captions), _PLACES), len(COLOURS))
    for i, content in enumerate(map(parse, captions)):
        if content.relation:
            first = RELATIONS.index(content.relation)
            for place, item in zip((first, first ^ 1), content.items, strict=True):
                kinds[i, place] = KINDS.index(item.kind)
                colours[i, place] = COLOURS.index(item.colour) if item.colour else len(COLOURS)
    return kinds, colours


def layout_loss(reader: LayoutReader, before: CLIPTextModel, tokens: Tensor, kinds: Tensor, colours: Tensor) -> Tensor:
    """Cross-entropy at the last four positions; the states before them stay what they were (`before`), for the UNet's sake."""
    states = reader.text_encoder(tokens).last_hidden_state
    with torch.no_grad():
        kept = before(tokens).last_hidden_state[:, :-_PLACES]
    telling = states[:, -_PLACES:].flatten(0, 1)
    said = F.cross_entropy(reader.kind(telling), kinds.flatten()) + F.cross_entropy(reader.colour(telling), colours.flatten())
    return said + (states[:, :-_PLACES] - kept).square().mean()


def order_loss(unet: UNet2DConditionModel, text_encoder: CLIPTextModel, alphas: Tensor, latents: Tensor, tokens: Tensor, generator: torch.Generator) -> Tensor:
    """Epsilon prediction on mirrored pairs, the first halves and then the second ones, `(2 P, 4, 8, 8)`.

    Both of a pair get the same noise and a time at which it still hides the order: only the caption tells them apart.
    """
    pairs = len(latents) // 2
    noise = torch.randn((pairs, *latents.shape[1:]), generator=generator).repeat(2, 1, 1, 1)
    times = (600 + 400 * (torch.arange(pairs) + torch.rand(pairs, generator=generator)) / pairs).long().clamp(max=999).repeat(2)
    alpha = alphas[times][:, None, None, None]
    noised = (alpha.sqrt() * latents + (1 - alpha).sqrt() * noise).contiguous(memory_format=torch.channels_last)
    predicted = unet(noised, times, text_encoder(tokens).last_hidden_state).sample
    worth = ((1 - alpha) / alpha).clamp(max=20)  # the error of the clean latent, where the order is; in that of the noise it hardly shows
    return (worth * (predicted - noise).square()).mean()


def detector_exactness(detector: ObjectDetector, images: Tensor, scenes: Sequence[Scene]) -> Tensor:
    """Per picture whether the detector names exactly the painted objects, each within 4 pixels, `(N,)` bool."""
    exact = []
    for found, scene in zip(detector.read(images), scenes, strict=True):
        left = list(scene.objects)
        for thing in found:
            match = next((o for o in left if (o.kind, o.colour) == (thing.kind, thing.colour) and abs(o.x - thing.x) < 4 and abs(o.y - thing.y) < 4), None)
            if match is None:
                left = [None]  # type: ignore[list-item]
                break
            left.remove(match)
        exact.append(not left)
    return torch.tensor(exact)
