"""One training from a recipe to a model in a folder, for the command and for Python alike."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safediffusion.config import dump, override, read_toml, resolve
from safediffusion.errors import UserError
from safediffusion.files import explained, write_json
from safediffusion.provenance import Seconds
from safediffusion.train import run_folder

if TYPE_CHECKING:
    from rich.console import Console

    from safediffusion.policies.latent import LatentPolicy
    from safediffusion.recipe import Recipe
    from safediffusion.train.export import Which
    from safediffusion.train.loop import Run


_LEAST_AGREEMENT = 0.8  # of rewards within a prompt, between the tiny autoencoder and the whole one


@dataclass(frozen=True)
class Trained:
    """A finished run: its model, where the weights come from in words, and what the run took over all its sittings."""

    model: Path
    origin: str
    iterations: int
    spent: Seconds


def load_recipe(path: Path | str, assignments: Sequence[str] = ()) -> Recipe:
    """The recipe of a TOML file, with `key.path=value` set; UserError for a mistake or an impossible combination."""
    from safediffusion.recipe import Recipe, check

    return check(resolve(Recipe, override(read_toml(path), assignments), str(path)))


def post_train(recipe: Recipe | Path | str, out: Path | str, *, command: Sequence[str] = (), console: Console | None = None) -> Trained:
    """Train, or go on with the run in `out`, until its steps are done or it stops early; then write `out`/model.

    The model is a diffusers folder of the best checkpoint by the probes, or of the last one without probes. Under
    `accelerate launch` or `torchrun` every process calls this, and the main one alone writes and speaks.
    """
    from safediffusion import build, ranks
    from safediffusion.cost.plan import Watch, foresee, where
    from safediffusion.train import checkpoint
    from safediffusion.train.loop import train

    began, out = Seconds.now(), Path(out)
    recipe = load_recipe(recipe) if isinstance(recipe, str | Path) else recipe
    accelerator = ranks.accelerator(log_with=build.trackers(recipe) or None, project_dir=out)
    console = console if console and ranks.is_main() else _silent()
    with _entered(out, recipe, command):
        done = checkpoint.newest(out / "checkpoints")
        if done < recipe.steps and (fits := where(recipe, accelerator.device)):
            console.print(fits)
        run, measures = build.run(recipe, accelerator)
        if measures and ranks.is_main():
            write_json(out / "direction.json", measures)
        _measure_sketch(recipe, run, out, console)
        if recipe.log.trackers:
            accelerator.init_trackers("safediffusion", config=_flat(dataclasses.asdict(recipe)))
        watch = Watch(foresee(recipe, run, done), console)
        desk = Seconds.now() - began

        def hear(record: dict[str, Any], step: int) -> None:
            watch(record)
            accelerator.log(_numbers(record), step=step)

        progress = train(run, out, console, hear)
        for tracker in accelerator.trackers:  # no end_training(): it would part the processes
            tracker.finish()
        # The loop counts its own time over all sittings; what it took to build things comes on top.
        spent = Seconds(progress.seconds, progress.cpu_seconds) + Seconds(desk.wall, sum(ranks.gathered(desk.cpu)))
        origin = ranks.from_main(lambda: export_run(out, run.learner.policy, out / run_folder.MODEL))
    return Trained(out / run_folder.MODEL, origin, progress.step, spent)


def open_run(folder: Path) -> tuple[Recipe, LatentPolicy]:
    """The recipe of a run folder and its policy at the base weights. UserError for what is no run folder."""
    from safediffusion.hub import resolve_model
    from safediffusion.policies.latent import load_policy

    if not run_folder.is_run(folder):
        raise UserError(f"{folder} is not the folder of a run: it has no {run_folder.FACTS} and {run_folder.RECIPE}; give the --out of a `safediffusion train`")
    recipe = load_recipe(folder / run_folder.RECIPE)
    options = dataclasses.replace(recipe.policy, quantise="none", shard=False)  # what is written has the adapters on the exact base
    return recipe, load_policy(resolve_model(recipe.model, recipe.revision), options)


def export_run(folder: Path, policy: LatentPolicy, to: Path, which: Which | None = None, lora: bool = False, dtype: str | None = None) -> str:
    """Write the chosen weights of a run as a diffusers folder, in `dtype` or the base model's precision, or as LoRA; says in words which they are."""
    from safediffusion.train.export import choose

    chosen = choose(folder, list(policy.state()), which)
    try:
        policy.load_state(chosen.weights)
    except ValueError as error:
        raise UserError(f"the checkpoints of {folder} do not fit its recipe: {error}") from None
    with explained(to):
        if lora:
            policy.save_lora(to)
        else:
            policy.save_pipeline(to, dtype)
    return str(chosen)


@contextmanager
def _entered(out: Path, recipe: Recipe, command: Sequence[str]) -> Iterator[None]:
    """The main process enters the folder and keeps it; the others begin when it is in."""
    from safediffusion import build, ranks

    with ExitStack() as stack:
        ranks.from_main(lambda: stack.enter_context(run_folder.entered(out, dump(recipe), build.identity(recipe), command)))
        yield


def _measure_sketch(recipe: Recipe, run: Run, out: Path, console: Console) -> None:
    """At the start of a run, on 32 pictures of the base for its own training prompts; `out`/tiny_vae.json keeps it."""
    from safediffusion import ranks, seeds
    from safediffusion.rollout import sketch_shift
    from safediffusion.train import checkpoint

    name = recipe.policy.tiny_vae
    if name is None or run.learner.reward is None or checkpoint.newest(out / "checkpoints"):
        return
    learner, shown = run.learner, run.prompts(0)[:8]

    def measured() -> dict[str, float]:
        generator = seeds.generator("sketch", run.seed)
        return sketch_shift(learner.policy, learner.process, learner.reward, shown, 32 // len(shown), learner.guidance, generator, learner.batch)

    own = measured() if learner.policy.sharded else None  # all must run the same, and go by what one of them found
    found = ranks.from_main(lambda: own or measured())
    if ranks.is_main():
        write_json(out / run_folder.TINY_VAE, {"tiny_vae": name, **found})
    console.print(
        f"{name} moves the reward by {found['shift']:+.4f} (standard deviation {found['spread']:.4f}); "
        f"within a prompt's pictures it agrees with the whole autoencoder at a correlation of {found['agreement']:.2f}"
    )
    if not found["agreement"] >= _LEAST_AGREEMENT:
        raise UserError(
            f"policy.tiny_vae: rewards of {name} and of the model's own autoencoder correlate at {found['agreement']:.2f} within a prompt, {_LEAST_AGREEMENT} needed; "
            "it is not the tiny autoencoder of this model's latents - choose another, or leave it out"
        )


def _silent() -> Console:
    from rich.console import Console

    return Console(quiet=True)


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    return {key: float(value) for key, value in record.items() if isinstance(value, int | float)}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """What trackers take for hyper-parameters: no tables, no lists."""
    flat: dict[str, str | int | float | bool] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, str | int | float | bool) else json.dumps(value)
    return flat
