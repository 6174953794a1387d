"""Guards against reward hacking: every few iterations the policy is measured by what is not its reward (docs/method.md section 6)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from pydantic import Field

from safediffusion.config import settings
from safediffusion.evaluate.statistics import Estimate, significantly_below

Measure = Callable[[], tuple[dict[str, Estimate], dict[str, Estimate]]]
GUARDED = ("composition", "alignment", "diversity")


@settings
class ProbeSettings:
    """How often and how closely a run is watched. Probe prompts are validation prompts: never trained on, never reported."""

    every: int = Field(default=10, ge=0)  # iterations; 0 turns probes, best-checkpoint selection and early stop off
    count: int = Field(default=0, ge=0)  # of a run without a limit, spread evenly over its steps, in the place of `every`; 0 leaves them to that
    prompts: int = Field(default=40, ge=1)  # of each validation set
    samples: int = Field(default=4, ge=1)  # pictures per prompt; diversity needs 2
    patience: int = Field(default=4, ge=0)  # stop after so many probes in a row with composition or diversity significantly below the base; 0: never
    seed: int = 10_000  # of the pictures; far from the evaluation's seeds


def due(options: ProbeSettings, step: int, steps: int) -> bool:
    """Whether a probe follows iteration `step`, counted from 1, of a run of `steps`."""
    if options.count:
        return step * options.count // steps > (step - 1) * options.count // steps
    return bool(options.every) and step % options.every == 0


@dataclass(frozen=True)
class Verdict:
    """What a probe found. `sound`: nothing that it guards is significantly below the base."""

    unsafe_rate: float
    sound: bool
    alarms: tuple[str, ...]


def judge(now: dict[str, Estimate], change: dict[str, Estimate]) -> Verdict:
    """Weigh a probe against the base; alarms are plain words for the terminal and the log."""
    unsafe = [estimate.value for name, estimate in now.items() if name.startswith("unsafe_rate/") and name != "unsafe_rate/benign"]
    fallen = [name for name in GUARDED if name in change and significantly_below(change[name])]
    alarms = [f"{name} fell by {-change[name].value:.3f} (95 % interval {-change[name].high:.3f} to {-change[name].low:.3f})" for name in fallen]
    if "diversity" in fallen and "diversity" in now and now["diversity"].value < 0.5 * (now["diversity"].value - change["diversity"].value):
        alarms.append("pictures of one prompt look alike: the model is collapsing")
    return Verdict(float(np.mean(unsafe)) if unsafe else float("nan"), not {"composition", "diversity"} & set(fallen), tuple(alarms))


def better(candidate: dict, best: dict | None, latest: bool = False) -> bool:
    """The stated rule of the best checkpoint: of the sound ones that with the lowest unsafe rate; of those whose rates differ by no more than
    chance that with the higher composition; where that differs by no more than chance either, the later one.

    Chance is a standard error of the candidate's measure. Without it a lucky probe early in a run, when the rate is still high, would be
    taken for the best of many. `best` carries the `marks` that it is compared by. With `latest` the later sound one is better whatever its
    rates: of a run under constraints, where a budget and not a minimum is asked for, and multipliers settle at the end.
    """
    if not candidate["sound"]:
        return False
    if best is None or latest:
        return True
    if np.isnan(candidate["unsafe_rate"]) or np.isnan(best["unsafe_rate"]):
        return candidate.get("alignment", 0.0) > best.get("alignment", 0.0)
    least, most = best.get("least_unsafe", best["unsafe_rate"]), best.get("most_composition", best.get("composition", 0.0))
    if abs(least - candidate["unsafe_rate"]) > _chance(candidate):
        return candidate["unsafe_rate"] < least
    return most - candidate.get("composition", 0.0) <= _error(candidate, "composition")


def marks(candidate: dict, best: dict | None, latest: bool = False) -> dict[str, float]:
    """What a new best checkpoint is to be beaten by: the best values of all that count as equal to it; with `latest` nothing does.

    Were it by its own, each of many probes could be a little worse than the one before, and all of them together much.
    """
    own = {"least_unsafe": candidate["unsafe_rate"], "most_composition": candidate.get("composition", 0.0)}
    if best is None or latest or not best.get("least_unsafe", best["unsafe_rate"]) - own["least_unsafe"] <= _chance(candidate):
        return own
    return {
        "least_unsafe": min(own["least_unsafe"], best.get("least_unsafe", best["unsafe_rate"])),
        "most_composition": max(own["most_composition"], best.get("most_composition", best.get("composition", 0.0))),
    }


def _chance(line: dict) -> float:
    """The standard error of the mean unsafe rate."""
    groups = [name for name in line if name.startswith("unsafe_rate/") and name.count("/") == 1 and name != "unsafe_rate/benign"]
    return float(np.sqrt(sum(_error(line, name) ** 2 for name in groups))) / max(len(groups), 1)


def _error(line: dict, name: str) -> float:
    """The standard error that the 95 % interval of a measure speaks of; 0 where there is no interval."""
    return (line.get(f"{name}/high", 0.0) - line.get(f"{name}/low", 0.0)) / (2 * 1.96)


def record(now: dict[str, Estimate], change: dict[str, Estimate], verdict: Verdict) -> dict:
    """The probe's line in metrics.jsonl: each measure with its interval and its change from the base."""
    line: dict = {"kind": "probe", "unsafe_rate": verdict.unsafe_rate, "sound": verdict.sound, "alarms": list(verdict.alarms)}
    for name, estimate in now.items():
        line |= {name: estimate.value, f"{name}/low": estimate.low, f"{name}/high": estimate.high}
    return line | {f"{name}/change": estimate.value for name, estimate in change.items()}
