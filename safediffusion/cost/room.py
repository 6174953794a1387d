"""Where the memory of a run goes, and which cards have so much."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from safediffusion.algorithms.d3po import D3po
from safediffusion.algorithms.ddpo import Ddpo
from safediffusion.algorithms.dpo import Dpo
from safediffusion.algorithms.dpok import Dpok
from safediffusion.algorithms.draft import Draft
from safediffusion.algorithms.grpo import Grpo
from safediffusion.algorithms.refl import Refl
from safediffusion.cost.forwards import Forwards
from safediffusion.cost.shapes import Shapes
from safediffusion.recipe import Recipe, is_probed
from safediffusion.rollout import DRIFT

_CARDS = (8, 12, 16, 24, 32, 48, 80, 141)  # GB of memory of usual cards
_GB = 2**30  # what makers of cards call so


@dataclass(frozen=True)
class Room:
    """Bytes of a run on one device, about, without its reward. All but `encoding` lie there together."""

    weights: float  # of the denoiser, its adapters, and the autoencoder
    encoders: float  # of text encoders that are kept
    learning: float  # gradients, Adam's two moments, the average
    base: float  # of the second denoiser that full training compares with
    pictures: float  # the graphs of a batch, or its widest place in the decoder where that is more
    latents: float  # of a rollout
    prompts: float  # of conditions that stay on the device
    encoding: float  # of text encoders that are dropped, alone on the device while they encode

    @property
    def training(self) -> float:
        return sum(dataclasses.astuple(self)) - self.encoding

    @property
    def bytes(self) -> float:
        return max(self.training, self.encoding)

    @property
    def card(self) -> int | None:
        """GB of the smallest usual card that it fits; None where none does.

        While it trains a tenth is left for what the allocator cannot use, and 2.5 GB for the driver and a reward of the size of CLIP ViT-L/14.
        """
        needed = max(1.1 * self.training + 2.5e9, self.encoding + 1.5e9)
        return next((card for card in _CARDS if needed <= card * _GB), None)

    def __str__(self) -> str:
        named = {"text encoders": self.encoders, "learning": self.learning, "base": self.base, "pictures": self.pictures}
        named |= {"latents": self.latents, "prompts": self.prompts}
        parts = ", ".join([f"weights {spelled_bytes(self.weights)}", *(f"{name} {spelled_bytes(count)}" for name, count in named.items() if count >= 5e7)])
        before = f"; text encoders alone beforehand {spelled_bytes(self.encoding)}" if self.encoding >= 5e7 else ""
        return f"about {spelled_bytes(self.bytes)} of memory without the reward: {parts}{before}"


def room(recipe: Recipe, counts: Forwards, shapes: Shapes, processes: int = 1) -> Room:
    """That of a recipe on a model of these shapes, on each of several processes."""
    options, batch = recipe.policy, min(recipe.optimizer.batch or counts.images, counts.images)
    decoded = 1 if options.vae_tile else batch
    sharded = options.shard and processes > 1
    return Room(
        weights=shapes.weights - (shapes.base * (1 - 1 / processes) - shapes.gathered if sharded else 0),
        encoders=shapes.text if options.text_encoders == "keep" else 0,
        learning=shapes.trained * 4 * (4 if recipe.optimizer.ema else 3),
        base=shapes.base if options.train == "full" and asks_base(recipe, counts) else 0,
        pictures=max(together(recipe, counts) * graphs(recipe, shapes.activations, shapes.painting), decoded * shapes.decoding),
        latents=remembered(recipe, counts, shapes.latent),
        prompts=prompts_kept(recipe, shapes.condition),
        encoding=shapes.text if options.text_encoders == "drop" else 0,
    )


def together(recipe: Recipe, counts: Forwards) -> int:
    """Pictures whose graphs lie there together: a micro-batch, and never less than those that are compared with each other (`Learner.parts`)."""
    algorithm, batch = recipe.algorithm, recipe.optimizer.batch
    compared = (2 if algorithm.pairs == "extremes" else algorithm.group) if isinstance(algorithm, Dpo | D3po) else 1
    return min(max(batch // compared, 1) * compared, counts.images) if batch else counts.images


def graphs(recipe: Recipe, activations: float, painting: float) -> float:
    """Bytes of what one image keeps at a time for a backward: a forward of the denoiser keeps `activations`, its decoded picture `painting`.

    With `train_guidance = "both"` there are both branches of guidance. A reward's gradient goes back through the decoder and through whole steps,
    both branches of guidance included. With `recompute` a step comes back only when the decoder's graph is gone.
    """
    algorithm, both = recipe.algorithm, activations * (1 if recipe.process.guidance == 1 else 2)
    if isinstance(algorithm, Grpo | Ddpo | Dpok | D3po):
        return both if algorithm.train_guidance == "both" else activations
    if not isinstance(algorithm, Draft | Refl):
        return activations
    if algorithm.recompute:
        return max(painting, both)
    return painting + both * (algorithm.last if isinstance(algorithm, Draft) else 1)


def asks_base(recipe: Recipe, counts: Forwards) -> bool:
    """Whether training or a probe compares with the base, or has it paint: it is read on first use and stays."""
    return counts.reference > 0 or _drifts(recipe) or is_probed(recipe)


def remembered(recipe: Recipe, counts: Forwards, latent: int) -> int:
    """Bytes of the latents of a rollout: of every step where a method walks again, and the base's where the drift from it is bounded."""
    card = recipe.algorithm.card
    kept = recipe.process.steps + 1 if card.log_probs or card.reward_gradient else 1
    return counts.images * (kept + _drifts(recipe)) * 4 * latent


def prompts_kept(recipe: Recipe, condition: int) -> int:
    """Bytes of the conditions that stay on the device, at most: of as many prompts as the run can draw, however few its files hold."""
    return min(recipe.policy.prompts_kept, recipe.steps * recipe.algorithm.prompts) * condition


def _drifts(recipe: Recipe) -> bool:
    return any(constraint.cost == DRIFT for constraint in recipe.constraints)


def spelled_bytes(count: float) -> str:
    return f"{count / 1e9:.0f} GB" if count >= 1e10 else f"{count / 1e9:.1f} GB"
