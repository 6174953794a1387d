"""How the base of the embedded world is schooled: to paint, then to hear which thing goes where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from safediffusion.images import from_uint8
from safediffusion.tiny import networks
from safediffusion.tiny.contrast import Sampler, render_twins, sample_mirrored
from safediffusion.tiny.fit import fit, learning_rate
from safediffusion.tiny.folders import replacing
from safediffusion.tiny.plan import Plan, encoded, latents_of, tokens_of, world_of
from safediffusion.tiny.pretrain import LayoutReader, denoising_loss, layout_loss, layout_targets, order_loss
from safediffusion.tiny.scenes import KINDS, RELATIONS

# The shipped base was begun for 14,000 steps and shortened twice: (until, planned steps). The rate follows what happened.
_PLANNED = ((1_750, 14_000), (2_500, 10_000))


@dataclass(frozen=True, eq=False)
class _Painting:
    """The world as the denoiser learns it: latents of unit scale with the tokens of their captions."""

    latents: Tensor  # (N, 4, 8, 8)
    tokens: Tensor  # (N, L)
    empty: Tensor  # (1, L), for guidance
    schedule: Tensor  # alphas_cumprod
    scale: float
    tokenizer: CLIPTokenizer

    @classmethod
    def of(cls, work: Path, plan: Plan, first: int) -> _Painting:
        world = world_of(work, plan, first)
        latents = latents_of(work, world)
        scale = 1 / latents.std().item()
        tokenizer = CLIPTokenizer.from_pretrained(work / "out" / "tokenizer")
        tokens, empty = tokens_of(tokenizer, world.captions), tokens_of(tokenizer, [""])
        return cls(latents * scale, tokens, empty, networks.scheduler().alphas_cumprod, scale, tokenizer)

    def loss(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, count: int, generator: torch.Generator) -> Tensor:
        index = torch.randint(len(self.latents), (count,), generator=generator)
        return denoising_loss(unet, text_encoder, self.schedule, self.latents[index], self.tokens[index], self.empty, generator)


def base(work: Path, plan: Plan, first: int) -> None:
    with replacing(work / "out" / "tokenizer") as folder:
        networks.build_tokenizer(list(world_of(work, plan, first).captions[:8000]), folder)
    painting = _Painting.of(work, plan, first)
    torch.manual_seed(first + 3)
    unet = networks.unet().to(memory_format=torch.channels_last)  # a third faster on a CPU
    text_encoder = networks.text_encoder(painting.tokenizer)

    def loss(generator: torch.Generator) -> Tensor:
        return painting.loss(unet, text_encoder, plan.batch, generator)

    def rate(step: int) -> float:
        return learning_rate(step, next((planned for until, planned in _PLANNED if step < until), plan.base), 1e-3)

    _school("base", "", unet, text_encoder, loss, work, plan, steps=plan.base, peak=1e-3, rate=rate, seed=first + 4, ema=0.9992)


def base_words(work: Path, plan: Plan, first: int) -> None:
    """The base's text encoder learns to say which thing goes where, which the noise alone never taught it."""
    seed, world = first + 5, world_of(work, plan, first)
    tokenizer = CLIPTokenizer.from_pretrained(work / "out" / "tokenizer")
    tokens = tokens_of(tokenizer, world.captions)
    kinds, colours = layout_targets(world.captions)
    related = (kinds < len(KINDS)).any(1).nonzero().flatten()
    before = CLIPTextModel.from_pretrained(work / "out" / "text_encoder").eval()
    torch.manual_seed(seed)
    reader = LayoutReader(CLIPTextModel.from_pretrained(work / "out" / "text_encoder").train())

    def loss(generator: torch.Generator) -> Tensor:
        telling = related[torch.randint(len(related), (2 * plan.batch,), generator=generator)]
        index = torch.cat([telling, torch.randint(plan.pictures, (plan.batch,), generator=generator)])
        return layout_loss(reader, before, tokens[index], kinds[index], colours[index])

    fit("base_words", reader, loss, work, steps=plan.base_words, peak=1e-3, seed=seed, checkpoint_every=plan.checkpoint_every)
    with replacing(work / "out" / "text_encoder_words") as folder:
        reader.text_encoder.save_pretrained(folder)


def base_order(work: Path, plan: Plan, first: int) -> None:
    """The base learns to paint it, on mirrored pairs: "left of" and "right of" at first."""

    def rate(step: int) -> float:
        return learning_rate(step, 1_200 if step < 1_200 else 2_400, 5e-4)  # begun for 1,200 steps, which were too few

    _mirrored("base_order", "_ordered", *_schooled(work, "", "_words"), sample_mirrored, work, plan, first, seed=first + 6, steps=plan.base_order, peak=5e-4, rate=rate)


def base_upright(work: Path, plan: Plan, first: int) -> None:
    """To "above" and "below" the base is still deaf, which no reward could mend: pairs of those above all."""

    def rate(step: int) -> float:
        return learning_rate(step, 800, 5e-4)  # by step 400 it would be right nine times in ten, with little left to learn

    sampler = partial(sample_mirrored, relations=(*RELATIONS, *4 * ("above", "below")))
    _mirrored("base_upright", "_upright", *_schooled(work, "_ordered"), sampler, work, plan, first, seed=first + 7, steps=plan.base_upright, peak=5e-4, rate=rate)


def base_settle(work: Path, plan: Plan, first: int) -> None:
    """The world alone again, at a falling rate: what the pairs shook loose settles.

    The order of things is half forgotten: what the base does at times, reinforcement can make it do always.
    """
    painting = _Painting.of(work, plan, first)
    unet, text_encoder = _schooled(work, "_upright")

    def loss(generator: torch.Generator) -> Tensor:
        return painting.loss(unet, text_encoder, plan.batch, generator)

    def rate(step: int) -> float:
        return learning_rate(step, plan.base_settle, 5e-4, warm_up=20)

    _school("base_settle", "_settled", unet, text_encoder, loss, work, plan, steps=plan.base_settle, peak=5e-4, rate=rate, seed=first + 8, ema=0.998)


def _mirrored(
    name: str, suffix: str, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, sampler: Sampler, work: Path, plan: Plan, first: int, seed: int, **schooling: Any
) -> None:
    """Half of each step the world as it is, half pairs from `sampler`."""
    painting = _Painting.of(work, plan, first)
    pixels, captions = render_twins(plan.mirrored, seed + 1000, sampler)
    vae = AutoencoderKL.from_pretrained(work / "out" / "vae").eval()
    mirrored, lesson = encoded(vae, from_uint8(pixels)) * painting.scale, tokens_of(painting.tokenizer, captions)
    half = plan.batch // 2

    def loss(generator: torch.Generator) -> Tensor:
        usual = painting.loss(unet, text_encoder, half, generator)
        pairs = 2 * torch.randint(plan.mirrored, (half // 2,), generator=generator)
        both = torch.cat([pairs, pairs + 1])
        return usual + order_loss(unet, text_encoder, painting.schedule, mirrored[both], lesson[both], generator)

    _school(name, suffix, unet, text_encoder, loss, work, plan, seed=seed, ema=0.998, **schooling)


def _schooled(work: Path, unet: str, text_encoder: str = "") -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """The base as the stages with these suffixes left it, to go on from; one suffix for both, or each its own."""
    out = work / "out"
    return (
        UNet2DConditionModel.from_pretrained(out / f"unet{unet}").train().to(memory_format=torch.channels_last),
        CLIPTextModel.from_pretrained(out / f"text_encoder{text_encoder or unet}").train(),
    )


def _school(name: str, suffix: str, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, loss: Callable, work: Path, plan: Plan, **schooling: Any) -> None:
    """Fit both networks of the base together, and leave each in the folder of its name and `suffix`."""
    both = torch.nn.ModuleDict({"unet": unet, "text": text_encoder})
    fit(name, both, loss, work, weight_decay=1e-3, checkpoint_every=plan.checkpoint_every, **schooling)
    for part, network in (("unet", unet), ("text_encoder", text_encoder)):
        with replacing(work / "out" / f"{part}{suffix}") as folder:
            network.save_pretrained(folder)
