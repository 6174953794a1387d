"""One resumable supervised training loop for all networks of the embedded world."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from safediffusion import weights
from safediffusion.files import explained

CHECKPOINT_EVERY = 250


def learning_rate(step: int, steps: int, peak: float, warm_up: int = 200) -> float:
    """Linear warm-up, then a cosine to 2 % of the peak."""
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))))


def fit(
    name: str,
    network: nn.Module,
    loss: Callable[[torch.Generator], Tensor],
    folder: Path,
    *,
    steps: int,
    peak: float,
    seed: int,
    ema: float = 0.0,
    weight_decay: float = 1e-4,
    rate: Callable[[int], float] | None = None,
    checkpoint_every: int = CHECKPOINT_EVERY,
) -> None:
    """Train `network` in place on `loss(generator)` for `steps`; with `ema` its averaged weights are what remains.

    The learning rate is a cosine from `peak`, or whatever `rate` says of a step. Resumes from `folder/name.safetensors`;
    where that cannot be read the training starts over, with a warning. The generator of a step depends on (seed, step)
    alone, so a resumed training equals an uninterrupted one.
    """
    optimizer = torch.optim.AdamW(network.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=weight_decay)
    average = copy.deepcopy(network).requires_grad_(False) if ema else network
    path = folder / f"{name}.safetensors"
    start = _resume(path, network, average, optimizer)
    for step, bar in _progress(name, start, steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step) if rate else learning_rate(step, steps, peak)
        value = loss(torch.Generator().manual_seed(seed * 1_000_003 + step))
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        if ema:
            # The average is warmed up: early on it forgets the random start quickly.
            keep = min(ema, (step + 1) / (step + 10))
            with torch.no_grad():
                for old, new in zip(average.parameters(), network.parameters(), strict=True):
                    old.lerp_(new, 1 - keep)
        bar(value)
        if (step + 1) % checkpoint_every == 0 or step + 1 == steps:
            _checkpoint(path, network, average, optimizer, step + 1)
    if ema:
        network.load_state_dict(average.state_dict())


def _checkpoint(path: Path, network: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    tensors = weights.prefixed("network", network.state_dict()) | weights.prefixed("optimizer", weights.optimizer_tensors(optimizer))
    if average is not network:
        tensors |= weights.prefixed("average", average.state_dict())
    with explained(path):
        weights.save(path, tensors, {"step": str(step)})


def _resume(path: Path, network: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    if not path.exists():
        return 0
    try:
        tensors, metadata = weights.load(path)
    except weights.CorruptFile as error:
        warnings.warn(f"{error}; this training starts over", stacklevel=3)
        return 0
    network.load_state_dict(weights.strip_prefix("network", tensors))
    weights.load_optimizer(optimizer, weights.strip_prefix("optimizer", tensors))
    if average is not network:
        average.load_state_dict(weights.strip_prefix("average", tensors))
    return int(metadata["step"])


def _progress(name: str, start: int, steps: int) -> Iterator[tuple[int, Callable[[Tensor], None]]]:
    figures = (MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}"), TimeElapsedColumn(), TimeRemainingColumn())
    columns = (TextColumn("{task.description}"), BarColumn(), *figures)
    running: list[float] = []
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(name, total=steps, completed=start, loss="-")
        for step in range(start, steps):

            def bar(value: Tensor, step: int = step) -> None:
                running.append(float(value.detach()))
                if len(running) == 50:
                    mean = sum(running) / 50
                    running.clear()
                    if not math.isfinite(mean):
                        raise FloatingPointError(f"the loss of '{name}' is not finite at step {step}")
                    progress.update(task, loss=f"{mean:.4f}")
                    if not progress.console.is_terminal:
                        progress.console.print(json.dumps({"stage": name, "step": step + 1, "loss": round(mean, 5)}))

            yield step, bar
            progress.update(task, completed=step + 1)
