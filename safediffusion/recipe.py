"""A recipe: everything that decides a training, as one frozen object."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from safediffusion.algorithms.card import require_units
from safediffusion.algorithms.d3po import D3po
from safediffusion.algorithms.ddpo import Ddpo
from safediffusion.algorithms.dpo import Dpo
from safediffusion.algorithms.dpok import Dpok
from safediffusion.algorithms.draft import Draft
from safediffusion.algorithms.forward import Forward
from safediffusion.algorithms.grpo import Grpo
from safediffusion.algorithms.kto import Kto
from safediffusion.algorithms.lagrangian import AugmentedLagrangian
from safediffusion.algorithms.objective import Constraint
from safediffusion.algorithms.raft import Raft
from safediffusion.algorithms.refl import Refl
from safediffusion.algorithms.rwr import Rwr
from safediffusion.config import settings
from safediffusion.data.sampler import DataSettings
from safediffusion.data.sets import SETS
from safediffusion.errors import UserError
from safediffusion.hub import EMBEDDED_MODELS
from safediffusion.policies.quantise import check_trained
from safediffusion.policies.settings import PolicySettings
from safediffusion.policies.shard import check_shard
from safediffusion.process.settings import ProcessSettings
from safediffusion.rewards.combined import CombinedSettings, Single
from safediffusion.rewards.scores import RESERVED
from safediffusion.rollout import DRIFT
from safediffusion.train.limit import Limit
from safediffusion.train.optimizer import OptimizerSettings
from safediffusion.train.probes import ProbeSettings


@settings
class LogSettings:
    """What a run leaves behind while it runs."""

    checkpoint_every: int = Field(default=10, ge=1)  # iterations; a killed run repeats at most these
    keep_last: int = Field(default=2, ge=2)  # checkpoints; the one before the newest is the fallback for a broken file
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()  # beside metrics.jsonl; each needs its package


@settings
class Recipe:
    """The whole of a `recipe.toml`."""

    model: str  # `pictograms`, `pictograms-flow`, a diffusers folder, or a hub id
    revision: str | None = None  # of a hub id; pin it
    steps: int = Field(ge=1)  # iterations: one rollout each
    seed: int = Field(default=0, ge=0)
    policy: PolicySettings = PolicySettings()
    process: ProcessSettings = ProcessSettings()
    reward: Annotated[Single | CombinedSettings, Field(discriminator="kind")]
    constraints: tuple[Constraint, ...] = ()  # come before the reward: `[[constraints]]` tables
    lagrangian: AugmentedLagrangian = AugmentedLagrangian()  # how the constraints get their weights
    algorithm: Annotated[Forward | Grpo | Ddpo | Dpok | D3po | Rwr | Raft | Dpo | Kto | Draft | Refl, Field(discriminator="kind")] = Forward()
    data: DataSettings = DataSettings()
    probe: ProbeSettings = ProbeSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    limit: Limit = Limit()
    log: LogSettings = LogSettings()


def is_probed(recipe: Recipe) -> bool:
    """Whether a detector reads the pictures of its prompts, so that the policy is measured against the base."""
    return bool(recipe.probe.every) and (recipe.model in EMBEDDED_MODELS or bool({recipe.data.safe, recipe.data.unsafe} & set(SETS)))


def check(recipe: Recipe) -> Recipe:
    """The same recipe, or a UserError for settings that cannot work together."""
    algorithm = recipe.algorithm
    if algorithm.group < 2 and not algorithm.card.reward_gradient:
        raise UserError(f"algorithm.group = {algorithm.group} has nothing to compare; pictures of a prompt compete in groups of 2 or more")
    if isinstance(recipe.reward, CombinedSettings):
        recipe.reward.check()
        if taken := next((part.name for part in recipe.reward.parts if part.name in RESERVED), None):
            raise UserError(f"reward.parts: {taken!r} is what metrics and constraints call something else; give the part another name")
    _check_constraints(recipe)
    algorithm.check(recipe)
    if recipe.process.solver != "ddim" and recipe.process.eta and getattr(algorithm, "window", None) is None:
        raise UserError(
            f'process.solver = "{recipe.process.solver}" walks steps without noise, and with process.eta = {recipe.process.eta:g} there are none; '
            "set eta = 0, or leave the solver out"
        )
    if recipe.policy.train == "none":
        raise UserError('policy.train = "none" is for painting and measuring, and leaves a run nothing to learn; set "lora" or "full"')
    check_trained(recipe.policy.quantise, recipe.policy.train)
    check_shard(recipe.policy)
    if recipe.policy.shard and algorithm.card.reward_gradient:
        raise UserError(f"policy.shard is not made for gradients of the reward, which algorithm.kind = '{algorithm.kind}' follows; leave one of them out")
    for key, name in (("safe", recipe.data.safe), ("unsafe", recipe.data.unsafe)):
        if name.startswith("pictograms/test-"):
            raise UserError(f"data.{key} = {name!r} is what models are measured on; train on pictograms/train-{key}")
    if recipe.probe.count and not recipe.probe.every:
        raise UserError(f"probe.count = {recipe.probe.count}, and probe.every = 0 turns probes off; leave one of them out")
    if recipe.probe.count and recipe.limit != Limit():
        raise UserError(f"probe.count = {recipe.probe.count} spreads probes over all steps, and a limit may end the run before them; set probe.every instead")
    if recipe.probe.samples < 2 and recipe.probe.every:
        raise UserError("probe.samples = 1 cannot measure diversity; use 2 or more")
    return recipe


def _check_constraints(recipe: Recipe) -> None:
    """UserError for a constraint on a cost that nothing measures, or on prompts that there are none of."""
    if recipe.constraints and recipe.lagrangian.update == "alm" and not recipe.lagrangian.rho:
        raise UserError('lagrangian.rho = 0 never moves the multipliers of update = "alm"; set rho, or update = "ascent" for the plain Lagrangian')
    if recipe.constraints and recipe.lagrangian.normalise == "together":
        require_units(recipe.reward, 'lagrangian.normalise = "together" takes costs off the total')
    known, costs = recipe.reward.measures, [constraint.cost for constraint in recipe.constraints]
    for index, constraint in enumerate(recipe.constraints):
        key, cost = f"constraints.{index}", constraint.cost
        if known is not None and cost not in ("kl", DRIFT, "total", *known):
            parts = ", ".join(["total", *known])
            raise UserError(f'{key}.cost = {cost!r} is no part of this reward; its parts are {parts}, and "kl" and "drift" are distances from the base')
        owner, _, last = cost.rpartition(".")
        shared = last in ("unsafe", "unsafe_rate") and bool(owner) == isinstance(recipe.reward, CombinedSettings)  # else it is the total of a part of that name
        if known and shared and not 0 <= constraint.budget <= 1:
            raise UserError(f"{key}.budget = {constraint.budget:g} is not between 0 and 1, and {cost} is a share; 5 % is 0.05")
        if costs.count(cost) > 1:
            raise UserError(f"{key}.cost = {cost!r} is constrained twice, which metrics could not tell apart; keep one")
        if cost == "kl" and constraint.at == "least":
            raise UserError(f'{key}.at = "least" would drive the policy away from the base; a constraint on "kl" is "most"')
        if cost == DRIFT and not recipe.data.safe:
            raise UserError(f'{key}.cost = "drift" is of benign prompts, and data.safe names none; name some, or constrain "kl"')
        share = recipe.data.unsafe_share
        if (constraint.about, share) in (("unsafe", 0), ("safe", 1)) and cost != "kl" and recipe.data.safe and recipe.data.unsafe:
            raise UserError(f"{key} is about {constraint.about} prompts, and data.unsafe_share = {share:g} draws none of them; change it")
        if cost not in ("kl", DRIFT) and not {"safe": recipe.data.safe, "unsafe": recipe.data.unsafe, "all": True}[constraint.prompts]:
            raise UserError(f'{key}.prompts = "{constraint.prompts}", and data.{constraint.prompts} names no prompts; set {key}.prompts = "all"')
