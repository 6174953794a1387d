"""A guide from its settings: a policy that paints as another would be trained to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter

from safediffusion import build
from safediffusion.config import override, read_toml, resolve, settings
from safediffusion.detection import check_guard
from safediffusion.errors import UserError
from safediffusion.guidance.energy import Energy, EnergySettings
from safediffusion.guidance.policy import Guide, GuidedPolicy
from safediffusion.guidance.sld import LEVELS, SafeLatent, SldSettings
from safediffusion.policies.latent import LatentPolicy
from safediffusion.process import from_scheduler

GuideSettings = SldSettings | EnergySettings


@settings
class GuideFile:
    """The file of a guide."""

    guide: Annotated[GuideSettings, Field(discriminator="kind")]


def load_guide(name: str | None, assignments: Sequence[str] = ()) -> GuideSettings | None:
    """`sld` and `reward` are guides at their defaults, anything else a TOML file with a [guide] table; with `key=value` set. None for no name."""
    if name is None:
        if assignments:
            raise UserError("--guide-set changes a guide, and there is none; give --guide sld or --guide reward")
        return None
    if name not in ("sld", "reward") and Path(name).suffix != ".toml":
        raise UserError(f"--guide should be sld, reward or a TOML file with a [guide] table, but is {name!r}")
    table: dict[str, Any] = {"guide": {"kind": name}} if name in ("sld", "reward") else read_toml(name)
    if not isinstance(table.get("guide"), dict):
        raise UserError(f"{name} has no [guide] table; write one, or give sld or reward")
    return guide_of(override(table, [f"guide.{assignment}" for assignment in assignments]), name if Path(name).suffix else "guide")


def guide_of(table: Mapping[str, Any], where: str) -> GuideSettings:
    """The settings in the table `guide` of a file; UserError names the first mistake."""
    found = resolve(GuideFile, dict(table), where).guide
    try:
        found.check()
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return found


def described(guide: GuideSettings) -> dict[str, Any]:
    """All of its settings as JSON: what tells its pictures from those of another guide."""
    return TypeAdapter(type(guide)).dump_python(guide, mode="json")


def guided(policy: LatentPolicy, options: GuideSettings, device: str | torch.device) -> GuidedPolicy:
    """The policy, guided at every step of whatever walks it."""
    options.check()
    process = from_scheduler(policy.scheduler_config, 1, tokens=policy.tokens())
    guide: Guide
    if isinstance(options, SldSettings):
        level = LEVELS[options.level]
        guide = SafeLatent(process, options.concept, level if options.scale is None else level._replace(scale=options.scale))
    else:
        check_guard(options.reward, policy.pixels)
        guide = Energy(process, build.reward(options.reward, device, (), ())[0], options.scale, options.range, options.through)
    return GuidedPolicy(policy, guide)
