"""What a run is going to take, said before it starts from a few timed forwards, and again once its own iterations are timed."""

from __future__ import annotations

import dataclasses
import math
import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from safediffusion import ranks
from safediffusion.cost.blueprints import BLUEPRINTS, write_configs
from safediffusion.cost.forwards import Forwards, forwards
from safediffusion.cost.pace import measure_pace
from safediffusion.cost.room import Room, asks_base, graphs, prompts_kept, remembered, room, spelled_bytes, together
from safediffusion.cost.shapes import Shapes, measure_shapes
from safediffusion.data.sets import load_set
from safediffusion.errors import UserError
from safediffusion.evaluate import pictograms
from safediffusion.hub import at_hand
from safediffusion.policies.families import find_family
from safediffusion.policies.latent import latent_shape
from safediffusion.policies.pipeline import load_empty, read_config
from safediffusion.policies.shard import gathered_bytes
from safediffusion.process import from_settings
from safediffusion.process.flow import tokens_in
from safediffusion.recipe import Recipe
from safediffusion.types import Process

if TYPE_CHECKING:
    from rich.console import Console

    from safediffusion.policies.latent import LatentPolicy
    from safediffusion.train.loop import Run

_SPEED = 1e14  # FLOP/s: a card of 80 GB does about two to four times as much in bfloat16, one of 24 GB about as much or less
_PROCESSES = (2, 4, 8)  # a sharded base is foreseen on
_ITERATIONS = 3  # after so many the plan is corrected; the first of them warms up and is left out


@dataclass(frozen=True)
class Plan:
    """`bytes` is the memory of the device, on a CPU that of the process; NaN seconds are not known."""

    images: int  # of an iteration
    iterations: int  # still to go
    seconds: float  # of an iteration
    probing: float  # seconds of all probes
    bytes: float

    def __str__(self) -> str:
        return f"needs about {spelled_bytes(self.bytes)}, {self.pace('')}"

    def pace(self, which: str) -> str:
        whole, many = spelled(self.iterations * self.seconds + self.probing), "s" if self.iterations > 1 else ""
        return f"{spelled_number(self.seconds / self.images)} s per image, {whole} for {which}{self.iterations} iteration{many}"


def foresee(recipe: Recipe, run: Run, done: int = 0) -> Plan | None:
    """The plan of a run of which `done` iterations are behind it; None when nothing is left, or the algorithm has no count.

    Two forwards, one backward and one decoded picture are timed. No random number is drawn, and neither gradients nor
    the reward (a user's function may count its calls) are touched, so the run stays what it would have been.
    """
    counts = forwards(recipe, process=run.learner.process)
    if counts is None or done >= recipe.steps:
        return None
    policy, batch = run.learner.policy, min(recipe.optimizer.batch or counts.images, counts.images)
    pace = measure_pace(policy, run.learner.process, batch, recipe.algorithm.card.reward_gradient)
    seconds = ((counts.rollout + counts.reference) * pace.forward + counts.trained * pace.trained + counts.images * pace.decode) / ranks.count()
    left = _reach(recipe, counts, seconds) - done
    if left < 1:
        return None
    probing = _probes(recipe, left, done == 0) * (2 * pictograms.STEPS * pace.forward + pace.decode) if run.measure else 0.0
    more = sum(weight.numel() for weight in run.learner.parameters) * (12 if done == 0 else 4)  # gradients, and two moments
    more += _base_bytes(policy) if asks_base(recipe, counts) else 0
    more += gathered_bytes(policy.denoiser) if policy.sharded else 0
    more += together(recipe, counts) * graphs(recipe, pace.activations, pace.painting) + remembered(recipe, counts, math.prod(policy.sample_shape))
    more += prompts_kept(recipe, policy.encode.unconditional.nbytes)
    return Plan(counts.images, left, seconds, probing, _resident(policy.device) + more)


@dataclass
class Watch:
    """Hears the records of the loop and says once what they make of the plan. With few iterations left it says nothing."""

    plan: Plan | None
    console: Console
    heard: list[float] = field(default_factory=list)  # seconds of this sitting's iterations

    def __post_init__(self) -> None:
        if self.plan is not None:
            self.console.print(str(self.plan))

    def __call__(self, record: Mapping[str, Any]) -> None:
        if self.plan is None or record.get("kind") != "train" or len(self.heard) == _ITERATIONS:
            return
        self.heard.append(self.plan.images / record["images_per_second"])
        left = self.plan.iterations - _ITERATIONS
        if len(self.heard) == _ITERATIONS and left > 0:
            seconds = sum(self.heard[1:]) / (_ITERATIONS - 1)
            probing = self.plan.probing * seconds / self.plan.seconds
            found = dataclasses.replace(self.plan, iterations=left, seconds=seconds, probing=probing)
            self.console.print(f"after {_ITERATIONS} iterations: {found.pace('the other ')}")


def outline(recipe: Recipe) -> str:
    """What is known of a recipe without running anything, in lines: forwards, and for a model on this machine or of a known shape FLOP and memory."""
    counts = counts_of(recipe)
    if counts is None:
        return ""
    parts = f"{counts.rollout / counts.images:g} of the rollout, {counts.training / counts.images:g} of training"
    said = f"{counts.per_image:g} denoiser forwards per image ({parts}; a backward counts as two), {counts.images} images per iteration"
    with _configs(recipe) as folder:
        shapes = None if folder is None else measure_shapes(folder, recipe.policy)
    if shapes is None:
        return said
    work = flop(counts, shapes)
    whole = spelled(recipe.steps * work / _SPEED)
    time = f"{spelled_number(work / counts.images / 1e12)} TFLOP per image without the reward: {whole} for {recipe.steps} iterations at 100 TFLOP/s"
    if not recipe.policy.shard:
        taken = room(recipe, counts, shapes)
        return f"{said}\n{time}\n{taken}\n{_fits(taken)}"
    divided = {processes: room(recipe, counts, shapes, processes) for processes in _PROCESSES}
    return "\n".join([said, time, *(f"each of {processes} processes: {taken}; {_fits(taken)}" for processes, taken in divided.items())])


def where(recipe: Recipe, device: torch.device) -> str:
    """What takes the memory of a run that is about to start on this many processes, and whether their devices have so much; "" where it is not known."""
    counts, folder = counts_of(recipe), at_hand(recipe.model, recipe.revision)
    if counts is None or folder is None:
        return ""
    taken = room(recipe, counts, measure_shapes(folder, recipe.policy), ranks.count())
    if device.type != "cuda":
        return f"{taken}; {_fits(taken)}"
    there = torch.cuda.get_device_properties(device).total_memory
    return f"{taken}; {_fits(taken)}, and {device} has {spelled_bytes(there)}" + ("" if taken.bytes < there else ", which is too little")


def _fits(taken: Room) -> str:
    return f"fits a card of {taken.card} GB" if taken.card else "fits no single card"


def counts_of(recipe: Recipe) -> Forwards | None:
    """`forwards`, with guidance in the steps of the model's own grid where its config files are known.

    A hub model of no known shape that is not on this machine is counted on an even grid: guidance in an interval may then act in another number of steps.
    """
    with _configs(recipe) as folder:
        return forwards(recipe, process=None if folder is None else _process(recipe, folder))


def _process(recipe: Recipe, folder: Path) -> Process:
    from diffusers import AutoencoderKL

    family = find_family(folder)
    with torch.device("meta"):
        vae = load_empty(AutoencoderKL, folder / "vae")
    config = read_config(folder / "scheduler", "scheduler_config.json") | dict(family.scheduler)
    return from_settings(recipe.process, folder, config, tokens_in(latent_shape(folder, family, vae, recipe.policy.image_size), family.patch))


@contextmanager
def _configs(recipe: Recipe) -> Iterator[Path | None]:
    """A folder with the config files of the recipe's model; None for one that is not on this machine and of no known shape."""
    folder, blueprint = at_hand(recipe.model, recipe.revision), next((each for each in BLUEPRINTS.values() if recipe.model in each.names), None)
    if folder is not None or blueprint is None:
        yield folder
        return
    with TemporaryDirectory() as configs:
        write_configs(Path(configs), blueprint)
        try:
            yield Path(configs)
        except UserError as error:  # it names the folder, which nobody has made and nobody will find
            raise UserError(str(error).replace(configs, recipe.model)) from None


def flop(counts: Forwards, shapes: Shapes) -> float:
    """FLOP of an iteration without its reward. A backward is here what it is by count, not two forwards."""
    return (counts.rollout + counts.reference) * shapes.forward + counts.trained * (shapes.forward + shapes.backward) + counts.images * shapes.decode


def spelled(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def spelled_number(value: float) -> str:
    """Two digits, never in powers of ten for what a person meets."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}" if value >= 1e-4 else f"{value:.1e}"


def _reach(recipe: Recipe, counts: Forwards, seconds: float) -> int:
    """Iterations of the whole run, as far as its limit can be foreseen."""
    share = recipe.limit.share(counts.counted, seconds, seconds)
    return min(recipe.steps, math.ceil(1 / share)) if share else recipe.steps


def _probes(recipe: Recipe, left: int, first: bool) -> int:
    """Pictures that all probes paint: the first one paints the base as well."""
    sets = sum(min(recipe.probe.prompts, len(load_set(name))) for name in pictograms.VALIDATION_SETS.values())
    probes = math.ceil(recipe.probe.count * left / recipe.steps) or -(-left // recipe.probe.every)
    return sets * recipe.probe.samples * (1 + first + probes)


def _base_bytes(policy: LatentPolicy) -> int:
    """Of the second denoiser that full training compares with; it is read when it is first needed."""
    if policy.settings.train != "full":
        return 0
    return sum(weight.numel() for weight in policy.denoiser.parameters()) * (2 if policy.settings.dtype == "bfloat16" else 4)


def _resident(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
