"""`safediffusion tiny build`: trains the models of the embedded world one after another and packages them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console

from safediffusion.errors import UserError
from safediffusion.files import check_writable, read_text, write_json
from safediffusion.tiny.package import check_target, package
from safediffusion.tiny.stages import TRAINING, Plan

STAGES = (*TRAINING, "package")
SHIPPED = Plan()


def build(out: Path, work: Path, seed: int = 0, stages: Sequence[str] = STAGES, plan: Plan = SHIPPED) -> None:
    """Train what `work` does not hold yet and write the shipped folders to `out`.

    Resume = call again: a finished stage is skipped, a begun one goes on from its checkpoint. Seed 0 gives the shipped
    weights. It runs on one thread, because the order of sums, and so the last bit, depends on the number of threads.
    """
    if unknown := [stage for stage in stages if stage not in STAGES]:
        raise UserError(f"there is no stage {unknown[0]!r}; the stages are {', '.join(STAGES)}")
    if seed < 0:
        raise UserError(f"seed = {seed} is negative; give 0 or more")
    check_target(out)
    check_writable(work)
    _claim(work, seed, plan)
    console = Console(stderr=True, highlight=False)
    with _reproducible():
        for stage in TRAINING:
            if stage in stages:
                _train(stage, work, seed, plan, console)
    if "package" in stages:
        console.print(f"{', '.join(package(work, out))} -> {out}")


def _train(name: str, work: Path, seed: int, plan: Plan, console: Console) -> None:
    stage = TRAINING[name]
    if (work / "out" / stage.result).exists():
        console.print(f"{name}: already there")
        return
    for needed in stage.needs:
        if not (work / "out" / TRAINING[needed].result).exists():
            raise UserError(f"the stage {name} needs the result of {needed}, which {work} does not hold; run that stage first")
    console.print(f"{name} ({list(TRAINING).index(name) + 1} of {len(TRAINING)})")
    # A stage uses seeds from its first up to first + 1,011; so far apart, those of two builds never meet.
    stage.run(work, plan, 10_000 * seed)


def _claim(work: Path, seed: int, plan: Plan) -> None:
    """A work folder belongs to one seed and plan: a build that went on from another's checkpoints would be neither."""
    owner, mine = work / "plan.json", {"seed": seed, **dataclasses.asdict(plan)}
    if not owner.exists():
        write_json(owner, mine)
        return
    try:
        same = json.loads(read_text(owner)) == mine
    except ValueError:
        same = False
    if not same:
        raise UserError(f"{work} holds a build with another seed or other numbers of steps (see {owner}); choose another work folder")


@contextmanager
def _reproducible() -> Iterator[None]:
    """One thread and a generator of its own; what was set before comes back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)
