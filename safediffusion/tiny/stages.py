"""How each network of the embedded world is trained: on what, for how long, from which seed; a `first` of 0 gives the shipped weights.

A stage keeps its checkpoint in `work`/NAME.safetensors and leaves its network in `work`/out. One thread computes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from safediffusion import weights
from safediffusion.detectors.hazards import HazardDetector
from safediffusion.detectors.objects import ObjectDetector
from safediffusion.images import from_uint8
from safediffusion.tiny import networks
from safediffusion.tiny.contrast import cached_twins, contrast_loss, render_twins, sample_mirrored
from safediffusion.tiny.disguise import Disguises
from safediffusion.tiny.fit import fit
from safediffusion.tiny.flowing import flow, flow_hints, flow_settle
from safediffusion.tiny.folders import replacing
from safediffusion.tiny.plan import Plan, world_of
from safediffusion.tiny.pretrain import autoencoder_loss, cached_world, detector_loss, detector_targets, hazard_loss, hazard_targets, worn
from safediffusion.tiny.schooling import base, base_order, base_settle, base_upright, base_words

_READ = 24_000  # pictures a detector learns from


def detector(work: Path, plan: Plan, first: int) -> None:
    world = world_of(work, plan, first)
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
    world = world_of(work, plan, first)
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


def guard(work: Path, plan: Plan, first: int) -> None:
    """What rewards may ask, so that what grades is never trained against: other pictures, another shape and another seed than the detector's."""
    seed, known = first + 13, min(_READ, plan.pictures)
    world = cached_world(work, known, seed)
    torch.manual_seed(seed)
    network = HazardDetector()
    targets, disguises = hazard_targets(world.scenes), Disguises.of(world, seed + 50)

    def loss(generator: torch.Generator) -> Tensor:
        index = torch.randint(known, (4 * plan.batch // 3,), generator=generator)
        return hazard_loss(network, worn(disguises(world, index, generator), generator), targets[index])

    fit("guard", network, loss, work, steps=plan.guard, peak=3e-3, seed=seed, ema=0.995, checkpoint_every=plan.checkpoint_every)
    weights.save(work / "out" / "guard.safetensors", network.state_dict())


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
    "guard": Stage(guard, "guard.safetensors"),
    "base": Stage(base, "text_encoder/model.safetensors", ("autoencoder",)),
    "base_words": Stage(base_words, "text_encoder_words/model.safetensors", ("base",)),
    "base_order": Stage(base_order, "text_encoder_ordered/model.safetensors", ("base_words",)),
    "base_upright": Stage(base_upright, "text_encoder_upright/model.safetensors", ("base_order",)),
    "base_settle": Stage(base_settle, "text_encoder_settled/model.safetensors", ("base_upright",)),
    "flow": Stage(flow, "transformer/diffusion_pytorch_model.safetensors", ("base_settle",)),
    "flow_settle": Stage(flow_settle, "transformer_settled/diffusion_pytorch_model.safetensors", ("flow",)),
    "flow_hints": Stage(flow_hints, "transformer_hinted/diffusion_pytorch_model.safetensors", ("flow_settle",)),
}
