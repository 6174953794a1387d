"""The loop: prompts, one step, a line in the log, a probe, a checkpoint. It knows no algorithm; no algorithm knows the disk."""

from __future__ import annotations

import resource
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.console import Console

from safediffusion import ranks, seeds
from safediffusion.algorithms.update import Learner
from safediffusion.errors import UserError
from safediffusion.evaluate.statistics import Estimate
from safediffusion.progress import bars
from safediffusion.rollout import DRIFT
from safediffusion.train import checkpoint, log, probes
from safediffusion.train.average import Average
from safediffusion.train.limit import Limit
from safediffusion.types import Algorithm, Prompt
from safediffusion.weights import load_optimizer, optimizer_tensors

_DEAD = 10  # iterations without a living group, after which it is said once
_NOTHING = (
    f"the last {_DEAD} iterations had nothing to learn from: the pictures of each prompt score alike, to within algorithm.least_spread; "
    "where that is so from the start, the reward does not tell them apart"
)


@dataclass(frozen=True)
class Run:
    """Everything a training needs, built. `measure` gives (estimates, changes from the base) of the policy as it stands."""

    learner: Learner
    algorithm: Algorithm
    prompts: Callable[[int], tuple[Prompt, ...]]
    average: Average
    measure: Callable[[], tuple[dict[str, Estimate], dict[str, Estimate]]] | None
    probe: probes.ProbeSettings
    rate: Callable[[float], float]  # the learning rate by how many of the steps are behind
    steps: int
    seed: int
    checkpoint_every: int
    keep_last: int
    limit: Limit = field(default_factory=Limit)


@dataclass
class _Clock:
    """Wall and processor seconds of a run over all its sittings."""

    wall: float
    cpu: float

    def __post_init__(self) -> None:
        self._start, self._cpu = time.monotonic() - self.wall, _cpu_seconds()

    def now(self) -> tuple[float, float]:
        """Wall seconds are the main process's, so that all end together; processor seconds those of all."""
        wall, cpu = zip(*ranks.gathered((time.monotonic() - self._start, _cpu_seconds() - self._cpu)), strict=True)
        return wall[0], self.cpu + sum(cpu)


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def train(run: Run, folder: Path, console: Console, trackers: Callable[[dict, int], None] = lambda record, step: None) -> checkpoint.Progress:
    """Run, or resume, until `run.steps`, its limit, an early stop, or an error. The same command again continues bit-exactly.

    Several processes read the same folder, and the main one writes it; on another number of processes a run continues
    to within rounding.
    """
    saved = checkpoint.latest(folder / "checkpoints")
    progress = checkpoint.Progress() if saved is None else _restore(run, saved)
    if ranks.from_main(lambda: progress.step) != progress.step:
        raise UserError(f"process {ranks.index()} does not find the newest checkpoint in {folder}: all processes must see the same folder")
    if ranks.is_main():
        log.rewind(folder, -1 if saved is None else progress.step)  # without a checkpoint the first probe is repeated too
    clock = _Clock(progress.seconds, progress.cpu_seconds)
    if saved is not None:
        console.print(f"resuming after iteration {progress.step} of {run.steps}")
    if progress.step == 0 and run.measure is not None and run.probe.every:
        progress = _probe(run, folder, progress, clock, console, trackers)
    dead = 0  # iterations in a row that had nothing to learn from
    with bars(console) as bar:
        task = bar.add_task("train, % of its limit" if run.limit != Limit() else "train", **_reached(run, progress))
        while not _done(run, progress) and not _gone_bad(run, progress):
            progress, record = _iterate(run, progress, clock)
            if ranks.is_main():
                log.append(folder, record)
                trackers(record, progress.step)
            dead = dead + 1 if record.get("dead_groups") == 1 else 0
            if dead == _DEAD:
                console.print(f"[yellow]iteration {progress.step}: {_NOTHING}[/yellow]")
            if run.measure is not None and run.probe.every and (probes.due(run.probe, progress.step, run.steps) or _done(run, progress)):
                progress = _probe(run, folder, progress, clock, console, trackers)
            if progress.step % run.checkpoint_every == 0 or _done(run, progress):
                _save(run, folder, progress)
            bar.update(task, **_reached(run, progress), note=_note(record, progress))
    if _gone_bad(run, progress):
        _save(run, folder, progress)
        console.print(f"stopped early: the last {run.probe.patience} probes fell below the base; the best checkpoint is kept")
    return progress


def _iterate(run: Run, progress: checkpoint.Progress, clock: _Clock) -> tuple[checkpoint.Progress, dict]:
    learner, began = run.learner, time.monotonic()
    prompts, learner.iteration = run.prompts(progress.step), progress.step
    for group in learner.optimizer.param_groups:
        group["lr"] = run.rate(max(progress.step, _used(run, progress) * (run.steps - 1)))
    try:
        metrics = _step(run, prompts, progress.step)
    except FloatingPointError as error:
        told = f"iteration {progress.step + 1}: {error}; this run keeps its last checkpoint"
        raise UserError(f"{told} - start another with a lower optimizer.lr or a stronger KL") from error
    run.average.update()
    wall, cpu = clock.now()
    spent = {"trained": progress.trained + cpu - progress.cpu_seconds, "trained_wall": progress.trained_wall + wall - progress.seconds}
    progress = replace(progress, step=progress.step + 1, forwards=learner.forwards, seconds=wall, cpu_seconds=cpu, **spent)
    images = len(prompts) * run.algorithm.group
    record = {"kind": "train", "iteration": progress.step, "seconds": wall, "cpu_seconds": cpu, "forwards": learner.forwards} | metrics
    record |= {"images_per_second": images / (time.monotonic() - began), "peak_memory_gib": max(ranks.gathered(_peak_memory()))}
    return progress, record


def _step(run: Run, prompts: tuple[Prompt, ...], step: int) -> dict[str, float]:
    """One step of the algorithm; out of memory, it is repeated from the start with half as many pictures per forward, which changes no result."""
    learner, images = run.learner, len(prompts) * run.algorithm.group
    forwards, updates, memory = learner.forwards, learner.updates, dict(learner.memory)
    while True:
        try:  # every process draws for all pictures and takes what it needs, so that their number changes nothing
            return run.algorithm.step(learner, prompts, seeds.generator("train", run.seed, 0, step))
        except torch.OutOfMemoryError as error:
            held = min(learner.batch or images, images)
            if held == 1 or learner.updates > updates or ranks.count() > 1:  # the others cannot know, and wait
                raise UserError(
                    f"iteration {step + 1}: out of memory with {held} pictures per forward; set optimizer.batch lower, or policy.gradient_checkpointing = true"
                ) from error
            learner.batch, learner.forwards, learner.memory = held // 2, forwards, dict(memory)
        # Outside the handler: the exception holds the frames, and the frames the tensors, that are to be freed.
        learner.optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        warnings.warn(f"out of memory: going on with {learner.batch} pictures per forward; optimizer.batch = {learner.batch} starts there", stacklevel=2)


def _probe(run: Run, folder: Path, progress: checkpoint.Progress, clock: _Clock, console: Console, trackers: Callable) -> checkpoint.Progress:
    with run.average.applied():
        now, change = run.measure()
        verdict = probes.judge(now, change)
        wall, cpu = clock.now()
        line = probes.record(now, change, verdict) | {"iteration": progress.step, "seconds": wall, "cpu_seconds": cpu, "forwards": progress.forwards}
        latest = any(each.cost not in ("kl", DRIFT) for each in run.learner.objective.constraints)
        line["best"] = probes.better(line, progress.best, latest)
        if line["best"]:
            best = {key: value for key, value in line.items() if key != "alarms"} | probes.marks(line, progress.best, latest)
            progress = replace(progress, best=best)
            if ranks.is_main():
                checkpoint.write(checkpoint.best_path(folder, progress.step), checkpoint.Checkpoint(run.learner.policy.state(), {}, {}, progress))
    if ranks.is_main():
        log.append(folder, line)
        trackers({key: value for key, value in line.items() if isinstance(value, float)}, progress.step)
    for alarm in verdict.alarms:
        console.print(f"[yellow]iteration {progress.step}: {alarm}[/yellow]")
    return replace(progress, worse_in_a_row=0 if verdict.sound else progress.worse_in_a_row + 1, seconds=wall, cpu_seconds=cpu)


def _used(run: Run, progress: checkpoint.Progress) -> float:
    return run.limit.share(progress.forwards, progress.trained, progress.trained_wall)


def _done(run: Run, progress: checkpoint.Progress) -> bool:
    return progress.step >= run.steps or _used(run, progress) >= 1


def _gone_bad(run: Run, progress: checkpoint.Progress) -> bool:
    return 0 < run.probe.patience <= progress.worse_in_a_row


def _restore(run: Run, saved: checkpoint.Checkpoint) -> checkpoint.Progress:
    run.learner.policy.load_state(saved.policy)
    load_optimizer(run.learner.optimizer, saved.optimizer)
    run.average.load(saved.average)
    run.learner.forwards = saved.progress.forwards
    run.learner.memory = dict(saved.memory)
    return saved.progress


def _save(run: Run, folder: Path, progress: checkpoint.Progress) -> None:
    if ranks.is_main():  # all have the same
        state = checkpoint.Checkpoint(run.learner.policy.state(), optimizer_tensors(run.learner.optimizer), run.average.state(), progress, run.learner.memory)
        checkpoint.save(folder / "checkpoints", state, run.keep_last)
        checkpoint.sweep_best(folder, folder / "checkpoints")


def _peak_memory() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _reached(run: Run, progress: checkpoint.Progress) -> dict[str, int]:
    """What a bar shows: iterations, or of a run with a limit, whose number of iterations nobody knows, per cent."""
    if run.limit == Limit():
        return {"completed": progress.step, "total": run.steps}
    return {"completed": min(100, round(100 * max(progress.step / run.steps, _used(run, progress)))), "total": 100}


def _note(record: Mapping, progress: checkpoint.Progress) -> str:
    reward = f"reward {record['reward/total']:.3f}  " if "reward/total" in record else ""  # none where nothing is painted
    note = f"{reward}KL {record['kl']:.4f}  {record['images_per_second']:.1f} images/s"
    return note + (f"  best unsafe {progress.best['unsafe_rate']:.1%}" if progress.best else "")
