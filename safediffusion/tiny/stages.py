"""How each network of the embedded world is trained: on what, for how long, from which seed; a `first` of 0 gives the shipped weights.

A stage keeps its checkpoint in `work`/NAME.safetensors and leaves its network in `work`/out. One thread computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from safediffusion import weights
from safediffusion.detectors.objects import ObjectDetector
from safediffusion.images import from_uint8
from safediffusion.tiny import networks
from safediffusion.tiny.contrast import Sampler, cached_twins, contrast_loss, render_twins, sample_mirrored
from safediffusion.tiny.fit import CHECKPOINT_EVERY, fit, learning_rate
from safediffusion.tiny.folders import replacing
from safediffusion.tiny.pretrain import (
    LayoutReader,
    World,
    autoencoder_loss,
    cached_world,
    denoising_loss,
    detector_loss,
    detector_targets,
    layout_loss,
    layout_targets,
    order_loss,
    worn,
)
from safediffusion.tiny.scenes import KINDS, RELATIONS

_READ = 24_000  # pictures the detector learns from
# The shipped base was begun for 14,000 steps and shortened twice: (until, planned steps). The rate follows what happened.
_PLANNED = ((1_750, 14_000), (2_500, 10_000))


@dataclass(frozen=True)
class Plan:
    """Steps of each training, and the pictures they draw from. The defaults made the shipped weights."""

    detector: int = 1500
    autoencoder: int = 2000
    reward: int = 2500
    reward_order: int = 1600
    judge: int = 2000
    base: int = 4_500
    base_words: int = 1_500
    base_order: int = 1_600
    base_upright: int = 300
    base_settle: int = 300
    pictures: int = 60_000
    twins: int = 30_000
    mirrored: int = 12_000
    batch: int = 48  # pictures of a step, or pairs of twins
    checkpoint_every: int = CHECKPOINT_EVERY


def detector(work: Path, plan: Plan, first: int) -> None:
    world = _world(work, plan, first)
    known = min(_READ, plan.pictures)
    torch.manual_seed(first)
    network = ObjectDetector()
    targets = detector_targets(world.scenes[:known])

    def loss(generator: torch.Generator) -> Tensor:
        index = torch.randint(known, (4 * plan.batch // 3,), generator=generator)
        return detector_loss(network, worn(world.images(index), generator), tuple(part[index] for part in targets))

    fit("detector", network, loss, work, steps=plan.detector, peak=3e-3, seed=first + 1, ema=0.995, checkpoint_every=plan.checkpoint_every)
    weights.save(work / "out" / "detector.safetensors", network.state_dict())


def autoencoder(work: Path, plan: Plan, first: int) -> None:
    world = _world(work, plan, first)
    torch.manual_seed(first + 1)
    network = networks.autoencoder()

    def loss(generator: torch.Generator) -> Tensor:
        index = torch.randint(plan.pictures, (plan.batch,), generator=generator)
        return autoencoder_loss(network, world.images(index), generator)

    fit("vae", network, loss, work, steps=plan.autoencoder, peak=2e-3, seed=first + 2, ema=0.995, checkpoint_every=plan.checkpoint_every)
    with replacing(work / "out" / "vae") as folder:
        network.save_pretrained(folder)


def reward(work: Path, plan: Plan, first: int) -> None:
    _contrast("reward", work, plan, first + 11, plan.reward, text_width=64, vision_width=96, layers=3)


def reward_order(work: Path, plan: Plan, first: int) -> None:
    """More schooling for the reward, which by then cannot tell "left of" from "right of": pairs that differ in order alone."""
    seed = first + 11
    twins, mirrored = cached_twins(work, plan.twins, seed), render_twins(plan.mirrored, seed + 1000, sample_mirrored)
    tokenizer = CLIPTokenizer.from_pretrained(work / "out" / "reward")
    lesson = _Lesson.of(np.concatenate([twins[0], mirrored[0]]), twins[1] + mirrored[1], tokenizer)
    network = CLIPModel.from_pretrained(work / "out" / "reward").train()
    familiar = 5 * plan.batch // 12  # of a step's pairs; without any the rest would be forgotten

    def loss(generator: torch.Generator) -> Tensor:
        old = torch.randint(plan.twins, (familiar,), generator=generator)
        new = torch.randint(plan.mirrored, (plan.batch - familiar,), generator=generator)
        return lesson.loss(network, torch.cat([old, plan.twins + new]), generator)

    fit("reward_order", network, loss, work, steps=plan.reward_order, peak=1e-3, seed=seed + 50, ema=0.998, checkpoint_every=plan.checkpoint_every)
    with replacing(work / "out" / "reward_order") as folder:
        tokenizer.save_pretrained(folder)
        network.eval().save_pretrained(folder)


def judge(work: Path, plan: Plan, first: int) -> None:
    """Other pictures, another shape and another seed than the reward's: what it sees, training never followed."""
    _contrast("judge", work, plan, first + 12, plan.judge, text_width=96, vision_width=64, layers=4)


def _contrast(name: str, work: Path, plan: Plan, seed: int, steps: int, text_width: int, vision_width: int, layers: int) -> None:
    pixels, captions = cached_twins(work, plan.twins, seed)
    with replacing(work / "out" / name) as folder:
        tokenizer = networks.build_tokenizer(captions[:6000], folder)
        lesson = _Lesson.of(pixels, captions, tokenizer)
        torch.manual_seed(seed)
        network = networks.clip(tokenizer, text_width, vision_width, layers)

        def loss(generator: torch.Generator) -> Tensor:
            return lesson.loss(network, torch.randint(plan.twins, (plan.batch,), generator=generator), generator)

        fit(name, network, loss, work, steps=steps, peak=1e-3, seed=seed, ema=0.998, checkpoint_every=plan.checkpoint_every)
        network.eval().save_pretrained(folder)


@dataclass(frozen=True, eq=False)
class _Lesson:
    """Captioned pictures in pairs of twins. `meaning` (N,) is the same number for the same caption."""

    pixels: np.ndarray  # uint8 (N, 32, 32, 3)
    tokens: Tensor  # (N, L)
    mask: Tensor  # (N, L)
    meaning: Tensor

    @classmethod
    def of(cls, pixels: np.ndarray, captions: list[str], tokenizer: CLIPTokenizer) -> _Lesson:
        tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
        number = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
        return cls(pixels, tokens.input_ids, tokens.attention_mask, torch.tensor([number[caption] for caption in captions]))

    def loss(self, network: CLIPModel, pairs: Tensor, generator: torch.Generator) -> Tensor:
        index = torch.cat([2 * pairs, 2 * pairs + 1])
        images, meaning = worn(from_uint8(self.pixels[index.numpy()]), generator), self.meaning[index]
        return contrast_loss(network, images, self.tokens[index], self.mask[index], meaning[:, None] == meaning[None])


@dataclass(frozen=True, eq=False)
class _Painting:
    """The world as the denoiser learns it: latents of unit scale with the tokens of their captions."""

    latents: Tensor  # (N, 4, 8, 8)
    tokens: Tensor  # (N, L)
    empty: Tensor  # (1, L), for guidance
    scale: float
    tokenizer: CLIPTokenizer

    @classmethod
    def of(cls, work: Path, plan: Plan, first: int) -> _Painting:
        world = _world(work, plan, first)
        latents = _latents(work, world)
        scale = 1 / latents.std().item()
        tokenizer = CLIPTokenizer.from_pretrained(work / "out" / "tokenizer")
        return cls(latents * scale, _tokens(tokenizer, world.captions), _tokens(tokenizer, [""]), scale, tokenizer)

    def loss(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, count: int, generator: torch.Generator) -> Tensor:
        index = torch.randint(len(self.latents), (count,), generator=generator)
        return denoising_loss(unet, text_encoder, networks.scheduler().alphas_cumprod, self.latents[index], self.tokens[index], self.empty, generator)


def base(work: Path, plan: Plan, first: int) -> None:
    with replacing(work / "out" / "tokenizer") as folder:
        networks.build_tokenizer(list(_world(work, plan, first).captions[:8000]), folder)
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
    seed, world = first + 5, _world(work, plan, first)
    tokenizer = CLIPTokenizer.from_pretrained(work / "out" / "tokenizer")
    tokens = _tokens(tokenizer, world.captions)
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
    mirrored, lesson = _encoded(vae, from_uint8(pixels)) * painting.scale, _tokens(painting.tokenizer, captions)
    schedule, half = networks.scheduler().alphas_cumprod, plan.batch // 2

    def loss(generator: torch.Generator) -> Tensor:
        usual = painting.loss(unet, text_encoder, half, generator)
        pairs = 2 * torch.randint(plan.mirrored, (half // 2,), generator=generator)
        both = torch.cat([pairs, pairs + 1])
        return usual + order_loss(unet, text_encoder, schedule, mirrored[both], lesson[both], generator)

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


@torch.no_grad()
def _encoded(vae: AutoencoderKL, images: Tensor) -> Tensor:
    return torch.cat([vae.encode(part * 2 - 1).latent_dist.mean for part in images.split(500)])


def _tokens(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """Token numbers `(N, L)`, each caption filled up to the tokenizer's length."""
    return tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt").input_ids


def _world(work: Path, plan: Plan, first: int) -> World:
    return cached_world(work, plan.pictures, first + 1)


@torch.no_grad()
def _latents(work: Path, world: World) -> Tensor:
    """The latents of all pictures `(N, 4, 8, 8)` as the autoencoder gives them, kept in `work`."""
    path = work / "latents.pt"
    if not path.exists():
        vae = AutoencoderKL.from_pretrained(work / "out" / "vae").eval()
        latents = torch.cat([_encoded(vae, world.images(part)) for part in torch.arange(len(world.scenes)).split(500)])
        torch.save(latents, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
    return torch.load(path)


@dataclass(frozen=True)
class Stage:
    """One step of the build. `needs` are the stages whose result it reads; `result` is the file, under work/out, that it ends with."""

    run: Callable[[Path, Plan, int], None]
    result: str
    needs: tuple[str, ...] = ()


TRAINING = {
    "detector": Stage(detector, "detector.safetensors"),
    "autoencoder": Stage(autoencoder, "vae/diffusion_pytorch_model.safetensors"),
    "reward": Stage(reward, "reward/model.safetensors"),
    "reward_order": Stage(reward_order, "reward_order/model.safetensors", ("reward",)),
    "judge": Stage(judge, "judge/model.safetensors"),
    "base": Stage(base, "text_encoder/model.safetensors", ("autoencoder",)),
    "base_words": Stage(base_words, "text_encoder_words/model.safetensors", ("base",)),
    "base_order": Stage(base_order, "text_encoder_ordered/model.safetensors", ("base_words",)),
    "base_upright": Stage(base_upright, "text_encoder_upright/model.safetensors", ("base_order",)),
    "base_settle": Stage(base_settle, "text_encoder_settled/model.safetensors", ("base_upright",)),
}
