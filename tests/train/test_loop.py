"""The loop: resumed is uninterrupted, nothing is lost by an error, and probes decide what is kept and when to stop."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from safediffusion.algorithms.update import Learner
from safediffusion.errors import UserError
from safediffusion.evaluate.statistics import Estimate
from safediffusion.train import checkpoint
from safediffusion.train.checkpoint import Progress, best_path, latest
from safediffusion.train.export import choose
from safediffusion.train.loop import Run, train
from safediffusion.types import Prompt

MakeRun = Callable[..., Run]
Measures = tuple[dict[str, Estimate], dict[str, Estimate]]


class Killed(BaseException):
    """What no part of the program catches."""


def finished(run: Run, folder: Path) -> tuple[Progress, str]:
    """Train; where it ended and what it said."""
    console = Console(file=io.StringIO(), width=200)
    return train(run, folder, console), console.file.getvalue()


def dying(calls: int, death: BaseException | None = None, value: float = float("nan")) -> Callable[[Tensor, Sequence[Prompt]], Tensor]:
    """A reward of redness that fails at its n-th call: by `death`, or else by giving `value`."""
    count = 0

    def reward(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        nonlocal count
        count += 1
        if count == calls and death is not None:
            raise death
        return images[:, 0].mean((1, 2)) if count != calls else torch.full((len(images),), value)

    return reward


def drifted(learner: Learner) -> Measures:
    """Measures that depend on the weights alone, to the last bit."""
    size = float(sum(parameter.detach().double().abs().sum() for parameter in learner.parameters))
    now = {"unsafe_rate/seen": Estimate(size, size, size, 9), "composition": Estimate(-size, -size, -size, 9)}
    return now, {"composition": Estimate(0.1, 0.0, 0.2, 9)}


def scripted(*probes: tuple[float, float]) -> Callable[[Learner], Measures]:
    """Probes that find, in turn, these unsafe rates and these changes of composition."""
    turns = iter(probes)

    def measure(learner: Learner) -> Measures:
        unsafe, change = next(turns)
        now = {"unsafe_rate/seen": Estimate(unsafe, unsafe - 0.05, unsafe + 0.05, 9), "composition": Estimate(0.5, 0.4, 0.6, 9)}
        return now, {"composition": Estimate(change, change - 0.05, change + 0.05, 9)}

    return measure


# Resumed is uninterrupted


@pytest.mark.parametrize(
    "options",
    [
        {"algorithm": "forward", "train": "full", "ema": 0.9, "measure": drifted},
        {"algorithm": "grpo", "train": "lora", "ema": 0.0, "measure": drifted},
        {"algorithm": "forward", "train": "lora", "ema": 0.5, "checkpoint_every": 2},
        {"algorithm": "ddpo", "train": "lora"},
    ],
    ids=["full-average-probes", "grpo-lora-probes", "lora-average-sparse", "memory"],
)
def test_a_run_killed_twice_ends_as_one_that_was_not(
    make_run: MakeRun, tmp_path: Path, read_metrics: Callable, read_tensors: Callable, assert_same: Callable, options: dict[str, Any]
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finished(make_run(**options), whole)
    for calls in (1, 3):  # before the first checkpoint, and in the middle
        with pytest.raises(Killed):
            finished(make_run(**options, reward=dying(calls, Killed())), broken)
    progress, said = finished(make_run(**options), broken)
    assert progress.step == 4
    assert "resuming after iteration" in said
    assert read_metrics(broken) == read_metrics(whole)
    names = sorted(path.name for path in (whole / "checkpoints").iterdir())
    assert sorted(path.name for path in (broken / "checkpoints").iterdir()) == names
    bests = sorted(path.name for path in whole.glob("best*"))
    assert bool(bests) == ("measure" in options)
    assert sorted(path.name for path in broken.glob("best*")) == bests
    for name in [f"checkpoints/{name}" for name in names] + bests:
        assert_same(read_tensors(broken / name), read_tensors(whole / name))


def test_a_log_cut_short_and_a_checkpoint_cut_short_change_nothing(
    make_run: MakeRun, tmp_path: Path, read_metrics: Callable, read_tensors: Callable, assert_same: Callable
) -> None:
    whole, broken, newest = tmp_path / "whole", tmp_path / "broken", "checkpoints/step-000004.safetensors"
    finished(make_run(ema=0.5, measure=drifted), whole)
    shutil.copytree(whole, broken)
    (broken / newest).write_bytes((whole / newest).read_bytes()[:1000])
    (broken / "metrics.jsonl").write_bytes((whole / "metrics.jsonl").read_bytes()[:-20])
    with pytest.warns(UserWarning, match="falling back"):
        finished(make_run(ema=0.5, measure=drifted), broken)
    assert read_metrics(broken) == read_metrics(whole)
    assert_same(read_tensors(broken / newest), read_tensors(whole / newest))


def test_a_longer_run_goes_on_from_a_shorter_one(make_run: MakeRun, tmp_path: Path, read_tensors: Callable, assert_same: Callable) -> None:
    finished(make_run(), tmp_path / "whole")
    finished(make_run(steps=2), tmp_path / "grown")
    before = latest(tmp_path / "grown/checkpoints").progress
    after, _ = finished(make_run(), tmp_path / "grown")
    assert before.step == 2
    assert after.seconds > before.seconds  # the clock counts all sittings
    assert_same(*(read_tensors(tmp_path / name / "checkpoints/step-000004.safetensors") for name in ("grown", "whole")))


def test_a_finished_run_stays_as_it_is(make_run: MakeRun, tmp_path: Path) -> None:
    first, _ = finished(make_run(), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != "metrics.jsonl"}
    assert finished(make_run(reward=dying(1, Killed())), tmp_path)[0] == first
    assert {path: path.read_bytes() for path in before} == before


# Errors


@pytest.mark.parametrize(
    ("failing", "message"),
    [
        (lambda: dying(3, ZeroDivisionError("no light")), "the reward 'redness' failed: ZeroDivisionError: no light"),
        (lambda: dying(3), "the reward 'redness' gave no finite total for 4 of 4 pictures"),
    ],
)
def test_a_reward_that_fails_is_named_and_costs_one_iteration(
    make_run: MakeRun, tmp_path: Path, read_tensors: Callable, assert_same: Callable, failing: Callable, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        finished(make_run(reward=failing()), tmp_path / "run")
    assert latest(tmp_path / "run/checkpoints").progress.step == 2
    finished(make_run(), tmp_path / "run")  # mended, it goes on
    finished(make_run(), tmp_path / "whole")
    assert_same(*(read_tensors(tmp_path / name / "checkpoints/step-000004.safetensors") for name in ("run", "whole")))


def test_a_gradient_that_is_not_finite_is_the_users_to_mend(make_run: MakeRun, tmp_path: Path) -> None:
    finished(make_run(steps=1), tmp_path)

    def blind(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:  # a reward that does not notice that pictures are NaN
        return torch.arange(len(images)).float()

    run = make_run(reward=blind)
    saved = (tmp_path / "checkpoints/step-000001.safetensors").read_bytes()
    original, run.learner.policy.predict = run.learner.policy.predict, lambda *arguments: original(*arguments) * float("inf")
    with pytest.raises(UserError, match=r"iteration 2: the gradient norm is nan; this run keeps its last checkpoint - start another with a lower optimizer.lr"):
        finished(run, tmp_path)
    assert (tmp_path / "checkpoints/step-000001.safetensors").read_bytes() == saved
    assert latest(tmp_path / "checkpoints").progress.step == 1


def test_a_reward_that_tells_nothing_apart_is_said_once(make_run: MakeRun, tmp_path: Path) -> None:
    _, said = finished(make_run(steps=13, reward=lambda images, prompts: torch.ones(len(images))), tmp_path / "constant")
    assert said.count("the last 10 iterations had nothing to learn from") == said.count("iteration 10:") == 1
    _, said = finished(make_run(steps=13), tmp_path / "living")
    assert "nothing to learn from" not in said


# Probes


def test_the_best_checkpoint_is_the_safest_sound_one(make_run: MakeRun, tmp_path: Path, read_metrics: Callable, read_tensors: Callable, assert_same: Callable) -> None:
    probes = scripted((0.9, 0.0), (0.4, 0.0), (0.1, -0.2), (0.5, 0.0), (0.6, 0.0))
    run = make_run(measure=probes, every=1, keep_last=9)
    progress, said = finished(run, tmp_path)
    lines = [line for line in read_metrics(tmp_path) if line["kind"] == "probe"]
    assert [(line["best"], line["sound"]) for line in lines] == [(True, True), (True, True), (False, False), (False, True), (False, True)]
    assert progress.best["iteration"] == 1
    assert progress.best["unsafe_rate"] == 0.4
    assert "iteration 2: composition fell by 0.200 (95 % interval 0.150 to 0.250)" in said
    assert str(choose(tmp_path, list(run.learner.policy.state()))) == "the best checkpoint by the probes (iteration 1)"
    best = read_tensors(best_path(tmp_path, 1))
    then = read_tensors(tmp_path / "checkpoints/step-000001.safetensors")
    assert_same(best, {name: tensor for name, tensor in then.items() if name.startswith("policy.")})


def test_a_best_that_chance_may_have_chosen_says_so(make_run: MakeRun, tmp_path: Path) -> None:
    """0.41 is later than 0.40, and no worse by a standard error of 0.026."""
    run = make_run(measure=scripted((0.9, 0.0), (0.4, 0.0), (0.41, 0.0)))
    finished(run, tmp_path)
    told = str(choose(tmp_path, list(run.learner.policy.state())))
    assert told == "the best checkpoint by the probes (iteration 4; another was safer, at 40.0%, by no more than chance)"


def test_the_best_of_an_abandoned_stretch_is_not_exported(make_run: MakeRun, tmp_path: Path, read_tensors: Callable, assert_same: Callable) -> None:
    first = make_run(steps=6, measure=scripted((0.9, 0.0), (0.8, 0.0), (0.4, 0.0), (0.1, 0.0)), every=1, checkpoint_every=2, reward=dying(4, Killed()))
    with pytest.raises(Killed):  # after the probe of iteration 3 and before a checkpoint that names it
        finished(first, tmp_path)
    names, then = list(first.learner.policy.state()), latest(tmp_path / "checkpoints").policy
    assert choose(tmp_path, names).step == 2
    assert_same(choose(tmp_path, names).weights, then)
    # Repeated on another machine the stretch ends elsewhere, and finds nothing better.
    progress, _ = finished(make_run(steps=6, measure=scripted(*[(0.7, 0.0)] * 4), every=1, checkpoint_every=2), tmp_path)
    assert progress.best["iteration"] == 2
    assert choose(tmp_path, names).step == 2
    assert_same(choose(tmp_path, names).weights, then)
    assert list(tmp_path.glob("best*")) == [best_path(tmp_path, 2)]


def test_a_checkpoint_that_is_fallen_back_on_has_its_own_best(make_run: MakeRun, tmp_path: Path, assert_same: Callable) -> None:
    run = make_run(measure=scripted((0.9, 0.0), (0.4, 0.0), (0.1, 0.0)), checkpoint_every=2)
    finished(run, tmp_path)
    names, newest = list(run.learner.policy.state()), checkpoint.path_of(tmp_path / "checkpoints", 4)
    assert choose(tmp_path, names).step == 4
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.warns(UserWarning, match="falling back"):
        chosen = choose(tmp_path, names)
    assert chosen.step == 2
    assert_same(chosen.weights, checkpoint.read(checkpoint.path_of(tmp_path / "checkpoints", 2)).policy)
    with pytest.warns(UserWarning, match="falling back"):
        finished(make_run(measure=scripted((0.7, 0.0)), checkpoint_every=2), tmp_path)
    assert choose(tmp_path, names).step == 2
    assert list(tmp_path.glob("best*")) == [best_path(tmp_path, 2)]


def test_probes_measure_and_keep_the_average(make_run: MakeRun, tmp_path: Path, read_tensors: Callable) -> None:
    finished(make_run(ema=0.9, measure=scripted((0.5, 0.0), (0.4, 0.0), (0.3, 0.0))), tmp_path)
    best, last = read_tensors(best_path(tmp_path, 4)), read_tensors(tmp_path / "checkpoints/step-000004.safetensors")
    names = list(make_run().learner.policy.state())
    assert all(torch.equal(best[f"policy.{name}"], last[f"average.{i}"]) for i, name in enumerate(names))
    assert not all(torch.equal(best[f"policy.{name}"], last[f"policy.{name}"]) for name in names)


def test_a_run_that_stays_below_the_base_stops_early(make_run: MakeRun, tmp_path: Path, read_metrics: Callable) -> None:
    probes = scripted((0.9, 0.0), (0.2, -0.2), (0.1, 0.0), (0.1, -0.2), (0.0, -0.3))
    progress, said = finished(make_run(steps=9, measure=probes, every=1, patience=2, checkpoint_every=7), tmp_path)
    assert progress.step == 4
    assert "stopped early: the last 2 probes fell below the base" in said
    assert progress.best["iteration"] == 2
    assert latest(tmp_path / "checkpoints").progress.step == 4
    before = read_metrics(tmp_path)
    again, _ = finished(make_run(steps=9, measure=scripted(), every=1, patience=2), tmp_path)  # and stays stopped
    assert again.step == 4
    assert read_metrics(tmp_path) == before


def test_without_patience_it_never_stops(make_run: MakeRun, tmp_path: Path) -> None:
    progress, _ = finished(make_run(measure=scripted(*[(0.5, -0.2)] * 5), every=1, patience=0), tmp_path)
    assert progress.step == 4
    assert progress.best is None
    assert not list(tmp_path.glob("best*"))


# The log


def test_the_log_says_what_happened(make_run: MakeRun, tmp_path: Path) -> None:
    tracked: list[tuple[dict, int]] = []
    run = make_run(algorithm="grpo", measure=scripted((0.5, 0.0), (0.4, 0.0), (0.3, 0.0)))
    train(run, tmp_path, Console(file=io.StringIO()), lambda record, step: tracked.append((record, step)))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["iteration"]) for line in lines] == [("probe", 0), ("train", 1), ("train", 2), ("probe", 2), ("train", 3), ("train", 4), ("probe", 4)]
    assert [step for _, step in tracked] == [line["iteration"] for line in lines]
    wanted = {"reward/total", "reward/redness", "kl", "ratio/distance", "ratio/clipped", "dead_groups", "grad_norm", "images_per_second", "forwards", "peak_memory_gib"}
    assert wanted <= lines[1].keys()
    assert [line["forwards"] for line in lines if line["kind"] == "train"] == [4 * (3 + 4) * n for n in (1, 2, 3, 4)]
    clocks = [line["seconds"] for line in lines]
    assert clocks == sorted(clocks)
