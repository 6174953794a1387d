"""How good the shipped models are: measured on what none of them was trained on, kept in quality.json and told in README.md."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safediffusion import files, weights
from safediffusion.data.anchors import load_anchors
from safediffusion.data.sets import load_set
from safediffusion.detectors.hazards import HazardDetector
from safediffusion.detectors.objects import ObjectDetector
from safediffusion.encoders.clip import ClipEncoder
from safediffusion.evaluate import pictograms
from safediffusion.evaluate.pictograms import SETS, Judges, Painted
from safediffusion.evaluate.statistics import Estimate, rate
from safediffusion.evaluate.verdict import unsafe
from safediffusion.images import from_uint8
from safediffusion.policies.latent import load_policy
from safediffusion.policies.variant import AS_IT_IS
from safediffusion.rewards.direction import auc, fit_direction
from safediffusion.seeds import generator
from safediffusion.tiny.contrast import prefers_own, render_twins, retrieval, sample_mirrored
from safediffusion.tiny.disguise import Disguises
from safediffusion.tiny.pretrain import World, detector_exactness, hazard_targets, render_world
from safediffusion.tiny.quality_page import page

# A build with seed s draws from 10,000 s + (1, 11, 12, 13, 63, 1011), so these pictures are new to every model.
_SCENES_SEED, _TWINS_SEED, _MIRRORED_SEED, _DISGUISE_SEED = 99, 77, 78, 79
_AMONG = 256  # captions that a picture's own has to be found in
_BATCH = 250


def describe(folder: Path, out: Path, scenes: int = 2000, twins: int = 512, samples: int = 4, limit: int | None = None) -> dict[str, Any]:
    """Measure the packaged weights in `folder`; write quality.json and README.md to `out`. Takes some minutes."""
    quality = measure(folder, scenes, twins, samples, limit)
    files.write_json(out / "quality.json", quality)
    files.write_text(out / "README.md", page(quality))
    return quality


def measure(folder: Path, scenes: int, twins: int, samples: int, limit: int | None) -> dict[str, Any]:
    """Every number with its count and 95 % interval. `weights` names the package that they belong to."""
    world = render_world(scenes, _SCENES_SEED)
    detector = ObjectDetector.load(folder / "detector" / "model.safetensors")
    encoders = {name: ClipEncoder.load(folder / name) for name in ("reward", "judge")}
    judges, guard = Judges(detector, encoders["judge"]), HazardDetector.load(folder / "guard" / "model.safetensors")
    disguised = measure_disguised(guard, detector, world)
    measured = {
        "detector": {"exact": _detector(detector, world).as_dict(), **disguised["detector"]},
        "guard": {**{name: each.as_dict() for name, each in _guard(guard, world).items()}, **disguised["guard"]},
        "autoencoder": {"exact": _autoencoder(folder / "pipeline", detector, world).as_dict()},
        **{name: _clip(encoder, world, twins) for name, encoder in encoders.items()},
        "base": {name: each.as_dict() for name, each in _base(folder / "pipeline", judges, samples, limit).items()},
        "flow": {name: each.as_dict() for name, each in _base(folder / "flow", judges, samples, limit).items()},
    }
    return {"schema": 1, "weights": weights.sha256(folder / "hashes.json"), "files": _sizes(folder), "models": measured}


def _detector(detector: ObjectDetector, world: World) -> Estimate:
    parts = torch.arange(len(world.scenes)).split(_BATCH)
    return rate(torch.cat([detector_exactness(detector, world.images(part), [world.scenes[i] for i in part]) for part in parts]))


@torch.no_grad()
def _guard(guard: HazardDetector, world: World) -> dict[str, Estimate]:
    """How often it says rightly whether a scene holds a hazard, and of every kind whether it is there."""
    there, parts = hazard_targets(world.scenes).bool(), torch.arange(len(world.scenes)).split(_BATCH)
    said = torch.cat([guard(world.images(part)) >= 0.5 for part in parts])
    return {"any": rate(said.any(1) == there.any(1)), "kinds": rate((said == there).all(1))}


@torch.no_grad()
def measure_disguised(guard: HazardDetector, detector: ObjectDetector, world: World) -> dict[str, dict[str, dict[str, float]]]:
    """A world in disguise, the same pictures for both: how many hidden hazards each finds, and how many harmless pictures it lets pass.

    "outline" are hazards in the outline of a shape, and nothing else about them hidden; "hidden" are all other disguises.
    """
    there, parts = hazard_targets(world.scenes).bool().any(1), torch.arange(len(world.scenes)).split(_BATCH)
    disguises, draws = Disguises.of(world, _DISGUISE_SEED), generator(_DISGUISE_SEED, "quality")
    others = replace(disguises, dressed=disguises.rough)
    hidden = [others(world, part, draws) for part in parts]
    outlined = [from_uint8(disguises.dressed[part.numpy()]) for part in parts]
    warnings: dict[str, Callable[[Tensor], Tensor]] = {
        "guard": lambda images: guard(images).amax(1) >= 0.5,
        "detector": lambda images: torch.tensor([unsafe(found) for found in detector.read(images)]).bool(),
    }
    measured = {}
    for name, warns in warnings.items():
        said, seen = (torch.cat([warns(images) for images in kind]) for kind in (hidden, outlined))
        measured[name] = {"hidden": rate(said[there]).as_dict(), "hidden/harmless": rate(~said[~there]).as_dict(), "outline": rate(seen[there]).as_dict()}
    return measured


@torch.no_grad()
def _autoencoder(pipeline: Path, detector: ObjectDetector, world: World) -> Estimate:
    """Whether a picture that went through the latents is still read exactly."""
    policy, exact = load_policy(pipeline, AS_IT_IS), []
    for part in torch.arange(len(world.scenes)).split(_BATCH):
        rebuilt = policy.decode(policy.encode_images(world.images(part)))
        exact.append(detector_exactness(detector, rebuilt, [world.scenes[i] for i in part]))
    return rate(torch.cat(exact))


def _base(pipeline: Path, judges: Judges, samples: int, limit: int | None) -> dict[str, Estimate]:
    """The pipeline by the protocol of the embedded world, on the first `limit` prompts of each set."""
    policy = load_policy(pipeline, AS_IT_IS)
    prompts = {group: load_set(name)[:limit] for group, name in SETS.items()}
    process = pictograms.sampler(policy)
    images = {group: pictograms.paint(policy, process, those, samples, pictograms.GUIDANCE, 0) for group, those in prompts.items()}
    return pictograms.estimates(pictograms.mark(Painted(prompts, images, samples), judges))


def _clip(encoder: ClipEncoder, world: World, twins: int) -> dict[str, Any]:
    """Retrieval among near-twins, and how well the anchors' direction tells safe from unsafe, unseen hazards included."""
    found, chance = _retrieval(encoder, twins)
    direction = fit_direction(encoder, load_anchors("pictograms")).vector
    with torch.no_grad():
        parts = torch.arange(len(world.scenes)).split(_BATCH)
        pictures = torch.cat([encoder.image(world.images(part)) for part in parts]) @ direction
    dangerous = torch.tensor([any(not thing.colour for thing in scene.objects) for scene in world.scenes])
    prompts = [prompt for name in SETS.values() for prompt in load_set(name)]
    texts = encoder.text([prompt.text for prompt in prompts]) @ direction
    unsafe = torch.tensor([prompt.unsafe for prompt in prompts])
    return {
        "retrieval": found.as_dict(),
        "retrieval_chance": chance,
        "order": _order(encoder, twins).as_dict(),
        "auc/pictures": _auc(pictures[~dangerous].tolist(), pictures[dangerous].tolist()).as_dict(),
        "auc/prompts": _auc(texts[~unsafe].tolist(), texts[unsafe].tolist()).as_dict(),
    }


def _retrieval(encoder: ClipEncoder, twins: int) -> tuple[Estimate, float]:
    """How often the nearest of 256 captions is the picture's own, and how often a blind choice would be."""
    pixels, captions = render_twins(twins, _TWINS_SEED)
    hits, chances = [], []
    for start in range(0, len(captions), _AMONG):
        shown = captions[start : start + _AMONG]
        tokens = encoder.tokenizer(shown, padding="max_length", truncation=True, return_tensors="pt")
        same = torch.tensor([[one == other for other in shown] for one in shown])
        hits.append(retrieval(encoder.model, from_uint8(pixels[start : start + _AMONG]), tokens.input_ids, tokens.attention_mask, same))
        chances.append(same.float().mean().item())
    return rate(torch.cat(hits)), sum(chances) / len(chances)


def _order(encoder: ClipEncoder, pairs: int) -> Estimate:
    """How often a picture of two shapes is nearer to its caption than to the same with the relation turned round."""
    pixels, captions = render_twins(pairs, _MIRRORED_SEED, sample_mirrored)
    tokens = encoder.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    return rate(prefers_own(encoder.model, from_uint8(pixels), tokens.input_ids, tokens.attention_mask))


def _auc(safe: Sequence[float], unsafe: Sequence[float]) -> Estimate:
    """The area with the interval of Hanley and McNeil (Radiology 143, 1982)."""
    area, n, m = auc(safe, unsafe), len(safe), len(unsafe)
    one, two = area / (2 - area), 2 * area**2 / (1 + area)
    variance = (area * (1 - area) + (n - 1) * (one - area**2) + (m - 1) * (two - area**2)) / (n * m)
    half = 1.96 * math.sqrt(variance)
    return Estimate(area, max(0.0, area - half), min(1.0, area + half), n + m)


def _sizes(folder: Path) -> dict[str, dict[str, int]]:
    """Weights and bytes of each model, and the bytes of all files."""
    sizes = {}
    for path in sorted(folder.rglob("*.safetensors")):
        count = sum(tensor.numel() for tensor in weights.load(path)[0].values())
        sizes[path.parent.relative_to(folder).as_posix()] = {"parameters": count, "bytes": path.stat().st_size}
    everything = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {**sizes, "all": {"parameters": sum(size["parameters"] for size in sizes.values()), "bytes": everything}}
