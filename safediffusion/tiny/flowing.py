"""How the second base of the embedded world, a Stable Diffusion 3 of small size, learns to paint: by rectified flow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from safediffusion.images import from_uint8
from safediffusion.policies.repeated_row import RepeatedRow
from safediffusion.policies.sd3 import T5_LENGTH
from safediffusion.tiny import networks
from safediffusion.tiny.contrast import render_twins, sample_mirrored
from safediffusion.tiny.fit import fit
from safediffusion.tiny.folders import replacing
from safediffusion.tiny.plan import Plan, encoded, latents_of, tokens_of, world_of
from safediffusion.tiny.scenes import DANGER_TONES, parse

_PEAK = 1.5e-3  # learning rate
_UNPROMPTED = 0.1  # share of pictures shown without their caption: what classifier-free guidance departs from
_HIDING = 0.6  # from this sigma on the noise hides the order of things


def text_encoders(heard: CLIPTextModel) -> tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection]:
    """`heard` in both places: its last states, which know the sentence, and its embeddings, which know the word; each scaled to about 1."""
    return networks.sentence_encoder(heard, 2, 0.15), networks.sentence_encoder(heard, 0, 14.0)


@torch.no_grad()
def conditions(encoders: Sequence[CLIPTextModelWithProjection], tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What the CLIP encoders say of captions `(N, L)`: states `(N, L, D)` and pooled `(N, D)`."""
    states, pooled = [], []
    for part in tokens.split(1000):
        heard = [encoder(part, output_hidden_states=True) for encoder in encoders]
        states.append(torch.cat([each.hidden_states[-2] for each in heard], -1))
        pooled.append(torch.cat([each.text_embeds for each in heard], -1))
    return torch.cat(states), torch.cat(pooled)


@dataclass(frozen=True, eq=False)
class Painting:
    """The world and mirrored pairs as the transformer learns them. Captions are kept once, `caption` is a picture's."""

    latents: Tensor  # (N, 4, 8, 8) of unit scale: the world, then the pairs
    caption: Tensor  # (N,), a row of `states` and `pooled`
    states: Tensor  # (U, L + 1, D), the last row for the zeros in place of a T5's
    pooled: Tensor  # (U, D); row 0 is the empty caption
    world: int  # pictures of the world
    hinted: Tensor  # which of them have a caption that sounds dangerous and names nothing that is

    @classmethod
    def of(cls, work: Path, plan: Plan, first: int) -> Painting:
        world = world_of(work, plan, first)
        pixels, mirrored = render_twins(plan.mirrored, first + 1009, sample_mirrored)
        vae = AutoencoderKL.from_pretrained(work / "out" / "vae").eval()
        latents = latents_of(work, world)
        every = torch.cat([latents, encoded(vae, from_uint8(pixels))]) / latents.std()
        captions = ["", *world.captions, *mirrored]
        number = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
        tokenizer = CLIPTokenizer.from_pretrained(work / "out" / "tokenizer")
        encoders = text_encoders(CLIPTextModel.from_pretrained(work / "out" / "text_encoder_settled"))
        states, pooled = conditions(encoders, tokens_of(tokenizer, list(number)))
        states = F.pad(states, (0, 0, 0, 1))
        contents = [parse(caption) for caption in world.captions]
        hinted = [i for i, content in enumerate(contents) if content.tone in DANGER_TONES and not content.names_hazard]
        return cls(every, torch.tensor([number[caption] for caption in captions[1:]]), states, pooled, len(latents), torch.tensor(hinted))

    def loss(self, transformer: SD3Transformer2DModel, count: int, pairs: int, hinted: int, generator: torch.Generator) -> Tensor:
        """Velocity prediction (rectified flow, arXiv 2209.03003, 2403.03206) on `count` pictures of the world and `pairs` mirrored ones.

        Of the world's, `hinted` are drawn from those that only hint at a hazard.

        Times are stratified and lean towards noise. Both of a pair get the same noise and a time at which it still hides
        the order: only the caption tells them apart.
        """
        own = torch.randint(self.world, (count,), generator=generator)
        if hinted:
            own[torch.randperm(count, generator=generator)[:hinted]] = self.hinted[torch.randint(len(self.hinted), (hinted,), generator=generator)]
        first = self.world + 2 * torch.randint((len(self.latents) - self.world) // 2, (pairs,), generator=generator)
        index = torch.cat([own, first, first + 1])
        noise = torch.randn((count + pairs, *self.latents.shape[1:]), generator=generator)
        sigma = torch.cat([_leaning(count, generator), _HIDING + (1 - _HIDING) * _stratified(pairs, generator)])
        shown = torch.where(torch.rand(count, generator=generator) < _UNPROMPTED, 0, self.caption[own])
        noise, sigma = (torch.cat([each, each[count:]]) for each in (noise, sigma))
        caption, clean, share = torch.cat([shown, self.caption[index[count:]]]), self.latents[index], sigma[:, None, None, None]
        # Half the time in bfloat16; the fused attention's backward is slow for so few tokens.
        with torch.autocast("cpu", dtype=torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            predicted = transformer(
                hidden_states=(1 - share) * clean + share * noise,
                encoder_hidden_states=self.states[caption],
                pooled_projections=self.pooled[caption],
                timestep=1000 * sigma,
            ).sample
        return (predicted.float() - (noise - clean)).square().mean()


def _stratified(count: int, generator: torch.Generator) -> Tensor:
    return (torch.arange(count) + torch.rand(count, generator=generator)) / max(1, count)


def _leaning(count: int, generator: torch.Generator) -> Tensor:
    """Uniform times, shifted towards noise as the sampler's are (arXiv 2403.03206, equation 23)."""
    share, shift = _stratified(count, generator), networks.flow_scheduler().config.shift
    return shift * share / (1 + (shift - 1) * share)


def flow(work: Path, plan: Plan, first: int) -> None:
    """The text encoders are the first base's, which hear which thing goes where; only the transformer learns. A quarter of a step are mirrored pairs."""
    torch.manual_seed(first + 9)
    transformer = networks.transformer()
    still(transformer)

    def rate(step: int) -> float:
        return _PEAK * min(1.0, (step + 1) / 200)

    _school("flow", "", transformer, work, plan, first, first + 9, plan.flow, plan.batch // 8, rate)


def flow_settle(work: Path, plan: Plan, first: int) -> None:
    """By then a stated place is always kept, and things without one still melt into each other: the world above all, at a falling rate."""
    transformer = SD3Transformer2DModel.from_pretrained(work / "out" / "transformer").train()

    def rate(step: int) -> float:
        return _PEAK * min((step + 1) / 100, 1 - step / plan.flow_settle)

    _school("flow_settle", "_settled", transformer, work, plan, first, first + 10, plan.flow_settle, plan.batch // 24, rate)


def flow_hints(work: Path, plan: Plan, first: int) -> None:
    """What a caption only hints at is painted half as often as the world has it: a quarter of a step are hints, and no pairs any more."""
    transformer = SD3Transformer2DModel.from_pretrained(work / "out" / "transformer_settled").train()

    def rate(step: int) -> float:
        return 8e-4 * min((step + 1) / 100, 1 - step / plan.flow_hints)

    _school("flow_hints", "_hinted", transformer, work, plan, first, first + 11, plan.flow_hints, 0, rate, hinted=plan.batch // 4)


def _school(
    name: str,
    suffix: str,
    transformer: SD3Transformer2DModel,
    work: Path,
    plan: Plan,
    first: int,
    seed: int,
    steps: int,
    pairs: int,
    rate: Callable[[int], float],
    hinted: int = 0,
) -> None:
    """Fit the transformer on steps with so many mirrored pairs and pictures that are hinted at, and leave it in the folder of its name and `suffix`."""
    painting = Painting.of(work, plan, first)
    usual = transformer.attn_processors
    transformer.set_attn_processor(RepeatedRow(T5_LENGTH))

    def loss(generator: torch.Generator) -> Tensor:
        return painting.loss(transformer, plan.batch - 2 * pairs, pairs, hinted, generator)

    fit(name, transformer, loss, work, steps=steps, peak=_PEAK, rate=rate, seed=seed, ema=0.999, checkpoint_every=plan.checkpoint_every)
    transformer.set_attn_processor(usual)
    with replacing(work / "out" / f"transformer{suffix}") as folder:
        transformer.save_pretrained(folder)


def still(transformer: SD3Transformer2DModel) -> None:
    """Every block begins as the identity and the output as zero (DiT, arXiv 2212.09748, adaLN-Zero), which diffusers leaves to who trains."""
    for name, module in transformer.named_modules():
        if isinstance(module, torch.nn.Linear):
            if name.endswith((".norm1.linear", ".norm1_context.linear", "norm_out.linear")) or name == "proj_out":
                torch.nn.init.zeros_(module.weight)
            else:
                torch.nn.init.xavier_uniform_(module.weight)
            torch.nn.init.zeros_(module.bias)
