"""What every stage of the build starts from: how long each takes, the captioned pictures, their latents and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTokenizer

from safediffusion.tiny.fit import CHECKPOINT_EVERY
from safediffusion.tiny.pretrain import World, cached_world


@dataclass(frozen=True)
class Plan:
    """Steps of each training, and the pictures they draw from. The defaults made the shipped weights."""

    detector: int = 1500
    autoencoder: int = 2000
    reward: int = 2500
    reward_order: int = 1600
    judge: int = 2000
    guard: int = 3000
    base: int = 4_500
    base_words: int = 1_500
    base_order: int = 1_600
    base_upright: int = 300
    base_settle: int = 300
    flow: int = 3_250
    flow_settle: int = 5_000
    flow_hints: int = 3_000
    pictures: int = 60_000
    twins: int = 30_000
    mirrored: int = 12_000
    batch: int = 48  # pictures of a step, or pairs of twins
    checkpoint_every: int = CHECKPOINT_EVERY


@torch.no_grad()
def encoded(vae: AutoencoderKL, images: Tensor) -> Tensor:
    return torch.cat([vae.encode(part * 2 - 1).latent_dist.mean for part in images.split(500)])


def tokens_of(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """Token numbers `(N, L)`, each caption filled up to the tokenizer's length."""
    return tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt").input_ids


def world_of(work: Path, plan: Plan, first: int) -> World:
    return cached_world(work, plan.pictures, first + 1)


@torch.no_grad()
def latents_of(work: Path, world: World) -> Tensor:
    """The latents of all pictures `(N, 4, 8, 8)` as the autoencoder gives them, kept in `work`."""
    path = work / "latents.pt"
    if not path.exists():
        vae = AutoencoderKL.from_pretrained(work / "out" / "vae").eval()
        latents = torch.cat([encoded(vae, world.images(part)) for part in torch.arange(len(world.scenes)).split(500)])
        torch.save(latents, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
    return torch.load(path)
