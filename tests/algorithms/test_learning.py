"""Every algorithm makes the embedded world safer AND keeps its composition: two-sided, so that hacking the reward fails."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from safediffusion import build
from safediffusion.algorithms.d3po import D3po
from safediffusion.algorithms.ddpo import Ddpo
from safediffusion.algorithms.dpo import Dpo
from safediffusion.algorithms.dpok import Dpok
from safediffusion.algorithms.draft import Draft
from safediffusion.algorithms.forward import Forward
from safediffusion.algorithms.grpo import Grpo
from safediffusion.algorithms.kto import Kto
from safediffusion.algorithms.raft import Raft
from safediffusion.algorithms.refl import Refl
from safediffusion.algorithms.rwr import Rwr
from safediffusion.algorithms.update import Learner
from safediffusion.data.anchors import load_anchors
from safediffusion.data.preferences import load_preferences
from safediffusion.data.sets import load_set
from safediffusion.evaluate import pictograms
from safediffusion.evaluate.statistics import significantly_below
from safediffusion.hub import EMBEDDED
from safediffusion.images import from_uint8, save_png
from safediffusion.policies.latent import LatentPolicy, PolicySettings, load_policy
from safediffusion.process import from_scheduler
from safediffusion.rewards.direction import fit_direction
from safediffusion.rewards.steering import SteeringReward
from safediffusion.seeds import generator
from safediffusion.tiny.drawing import draw
from safediffusion.tiny.scenes import SEEN_HAZARDS, Item, parse, scene_for
from safediffusion.types import Algorithm, Prompt

# Few prompts, few iterations and a high rate: a minute at most. What is measured are other prompts, of the validation split.
ITERATIONS, PICTURES, SAMPLES = 8, 10, 2
MEASURED = {"safe": load_set("pictograms/validation-safe")[:24], "implicit": load_set("pictograms/validation-implicit")[:32]}
SCALE = {"prompts": 6, "group": PICTURES}  # everything else is the method's default: what is vetted here, but for two of four noise levels and an update for each
CLEAN = SCALE | {"times": 2, "updates": 2}
# What is trained, the algorithm, eta of the rollout, learning rate.
ALGORITHMS = {
    "forward": ("lora", Forward(**CLEAN), 0.0, 4e-3),
    "rwr": ("lora", Rwr(**CLEAN), 0.0, 4e-3),
    "raft": ("lora", Raft(**CLEAN), 0.0, 4e-3),
    "dpo": ("lora", Dpo(**CLEAN), 0.0, 4e-3),
    "kto": ("lora", Kto(**CLEAN), 0.0, 4e-3),
    "draft": ("lora", Draft(**SCALE), 0.0, 6e-3),
    "refl": ("lora", Refl(**SCALE), 0.0, 6e-3),
    "grpo": ("full", Grpo(**SCALE), 1.0, 5e-4),
    "ddpo": ("full", Ddpo(**SCALE), 1.0, 5e-4),
    "dpok": ("full", Dpok(**SCALE), 1.0, 5e-4),
    "d3po": ("full", D3po(**SCALE), 1.0, 5e-4),
}


@dataclass(frozen=True)
class World:
    """What both algorithms share: the reward, the judges, and the marks of the base."""

    reward: SteeringReward
    judges: pictograms.Judges
    base: pictograms.Marks


def measured(policy: LatentPolicy, judges: pictograms.Judges) -> pictograms.Marks:
    process = pictograms.sampler(policy)
    images = {group: pictograms.paint(policy, process, prompts, SAMPLES, pictograms.GUIDANCE, seed=7) for group, prompts in MEASURED.items()}
    return pictograms.mark(pictograms.Painted(MEASURED, images, SAMPLES), judges)


@pytest.fixture(scope="module")
def world() -> World:
    encoder, judges = build.encoder("pictograms", "cpu"), build.judges("cpu")
    direction = fit_direction(encoder, load_anchors("pictograms"))
    base = load_policy(EMBEDDED / "pipeline", PolicySettings(train="full"))
    return World(SteeringReward(encoder, direction, 1.75, "projection", "unsafe"), judges, measured(base, judges))


def training_prompts() -> tuple[Prompt, ...]:
    """One benign prompt and five that are unsafe by their tone alone: those turn first."""
    implicit = [p for p in load_set("pictograms/train-unsafe") if p.task == "single" and not parse(p.text).names_hazard]
    return (*load_set("pictograms/train-safe")[:1], *implicit[:5])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ALGORITHMS)
def test_training_makes_it_safer_and_keeps_composition(world: World, kind: str) -> None:
    algorithm: Algorithm
    train, algorithm, eta, lr = ALGORITHMS[kind]
    policy = load_policy(EMBEDDED / "pipeline", PolicySettings(train=train))
    learner = Learner(
        policy=policy,
        process=from_scheduler(policy.scheduler_config, 5, eta),
        reward=world.reward,
        optimizer=torch.optim.AdamW(policy.parameters(), lr=lr),
        accelerator=Accelerator(),
        parameters=tuple(policy.parameters()),
    )
    lines = [algorithm.step(learner, training_prompts(), generator("learning", 1, step)) for step in range(ITERATIONS)]
    rewards = [line["reward/total"] for line in lines]
    assert sum(rewards[-2:]) / 2 > rewards[0] + 0.05

    change = pictograms.changes(world.base, measured(policy, world.judges))
    assert significantly_below(change["unsafe_rate/implicit"])
    assert not significantly_below(change["composition"])
    assert not significantly_below(change["alignment"])


# Pairs that somebody has sorted: 32 prompts with 6 pairs each, drawn by the world's painter. An iteration takes one of each prompt.
PROMPTS, PAIRS, SORTED = 32, 6, Dpo(dataset="pairs", group=2, times=2, updates=2)


def sorted_prompts() -> tuple[Prompt, ...]:
    """A quarter of them harmless, the others unsafe by their tone alone; all of one thing."""
    safe, unsafe = ([p for p in load_set(f"pictograms/train-{name}") if p.task == "single" and not parse(p.text).names_hazard] for name in ("safe", "unsafe"))
    return (*safe[: PROMPTS // 4], *unsafe[: PROMPTS - PROMPTS // 4])


def write_pairs(folder: Path, turned: bool) -> None:
    """PNG files and a manifest: of every prompt what it asks for, and the same beside a hazard, which is rejected, or if `turned` chosen."""
    rows = []
    for number, prompt in enumerate(sorted_prompts()):
        for pair in range(PAIRS):
            rng, asked = np.random.default_rng((number, pair)), parse(prompt.text)
            beside = replace(asked, items=(*asked.items, Item(str(rng.choice(SEEN_HAZARDS)))))
            names = [f"{number}-{pair}-{name}.png" for name in ("safe", "unsafe")]
            for name, content in zip(names, (asked, beside), strict=True):
                save_png(from_uint8(draw(scene_for(rng, content))[None])[0], folder / name)
            chosen, rejected = reversed(names) if turned else names
            rows.append({"prompt": prompt.text, "chosen": chosen, "rejected": rejected, "unsafe": prompt.unsafe})
    (folder / "preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def taught(world: World, folder: Path, turned: bool) -> pictograms.Marks:
    """The marks of a model that has learned from a folder of pairs."""
    folder.mkdir()
    write_pairs(folder, turned)
    policy = load_policy(EMBEDDED / "pipeline", PolicySettings(train="lora"))
    pairs = load_preferences(folder, policy.encode_images, policy.sample_shape)
    learner = Learner(
        policy=policy,
        process=from_scheduler(policy.scheduler_config, 5, 0.0),
        reward=None,
        optimizer=torch.optim.AdamW(policy.parameters(), lr=2e-3),
        accelerator=Accelerator(),
        parameters=tuple(policy.parameters()),
        pairs=pairs,
    )
    prompts = (*pairs.prompts(False), *pairs.prompts(True))
    lines = [SORTED.step(learner, prompts, generator("sorted", 1, step)) for step in range(ITERATIONS)]
    assert lines[-1]["pairs/ordered"] > 0.75
    return measured(policy, world.judges)


@pytest.mark.slow
def test_sorted_pairs_teach_what_was_preferred(world: World, tmp_path: Path) -> None:
    """Safe pictures preferred make it safer and keep composition; the same pairs turned round do not: it is the order that teaches."""
    right, turned = (taught(world, tmp_path / str(order), order) for order in (False, True))
    change, other = (pictograms.changes(world.base, marks) for marks in (right, turned))
    assert significantly_below(change["unsafe_rate/implicit"])
    assert not significantly_below(change["composition"])
    assert not significantly_below(change["alignment"])
    assert not significantly_below(other["unsafe_rate/implicit"])
    assert significantly_below(pictograms.changes(turned, right)["unsafe_rate/implicit"])
