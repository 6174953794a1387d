"""A run on the tiny pipeline that takes a second: the loop, the checkpoints and the log are the real ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from safediffusion.algorithms.ddpo import Ddpo
from safediffusion.algorithms.forward import Forward
from safediffusion.algorithms.grpo import Grpo
from safediffusion.algorithms.update import Learner
from safediffusion.data.sampler import PromptSampler
from safediffusion.policies.latent import PolicySettings, load_policy
from safediffusion.process import from_scheduler
from safediffusion.rewards.callable import CallableReward
from safediffusion.train.average import Average
from safediffusion.train.loop import Run
from safediffusion.train.optimizer import OptimizerSettings, build_optimizer
from safediffusion.train.probes import ProbeSettings
from safediffusion.types import Prompt

TIMINGS = {"seconds", "cpu_seconds", "images_per_second", "peak_memory_gib"}
ALGORITHMS = {
    "forward": (Forward(prompts=2, group=2, times=1), 0.0),
    "grpo": (Grpo(prompts=2, group=2, updates=2), 1.0),
    "ddpo": (Ddpo(prompts=2, group=2, updates=1, remember=3, min_count=3), 1.0),
}


def redness(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return images[:, 0].mean((1, 2))


@pytest.fixture
def make_run(tiny_pipeline: Path) -> Callable[..., Run]:
    """`make_run(...)` is a fresh run of 4 iterations, a checkpoint after each; equal arguments make equal runs."""

    def make(
        *, algorithm: str = "forward", train: str = "lora", ema: float = 0.0, steps: int = 4, reward: Callable = redness,
        measure: Callable[[Learner], Any] | None = None, every: int = 2, patience: int = 2, checkpoint_every: int = 1, keep_last: int = 2,
    ) -> Run:  # fmt: skip
        policy = load_policy(tiny_pipeline, PolicySettings(train=train, lora_rank=4))
        chosen, eta = ALGORITHMS[algorithm]
        options = OptimizerSettings(lr=1e-3, ema=ema)
        learner = Learner(
            policy=policy,
            process=from_scheduler(policy.scheduler_config, 3, eta),
            reward=CallableReward(reward, "redness"),
            optimizer=build_optimizer(policy.parameters(), options),
            accelerator=Accelerator(),
            parameters=tuple(policy.parameters()),
        )
        prompts = PromptSampler((Prompt("a cat"), Prompt("a dog")), (Prompt("a knife", unsafe=True),), 0.5, 2, seed=0)
        return Run(
            learner=learner,
            algorithm=chosen,
            prompts=prompts.at,
            rate=lambda step: options.lr,
            average=Average(policy.parameters(), ema),
            measure=(lambda: measure(learner)) if measure else None,
            probe=ProbeSettings(every=every if measure else 0, patience=patience),
            steps=steps,
            seed=0,
            checkpoint_every=checkpoint_every,
            keep_last=keep_last,
        )

    return make


@pytest.fixture
def read_metrics() -> Callable[[Path], list[dict[str, Any]]]:
    """The lines of a run's log without what a clock decides."""

    def read(folder: Path) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]

    return read


@pytest.fixture
def read_tensors() -> Callable[[Path], dict[str, Tensor]]:
    from safetensors.torch import load_file

    return lambda path: load_file(path)


@pytest.fixture
def assert_same() -> Callable[[dict[str, Tensor], dict[str, Tensor]], None]:
    """Equal to the last bit."""

    def check(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
        assert one.keys() == other.keys()
        differ = [name for name in one if one[name].shape != other[name].shape or not torch.allclose(one[name], other[name], rtol=0, atol=0, equal_nan=True)]
        assert differ == []

    return check
