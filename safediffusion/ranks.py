"""One piece of work on several processes: which share is whose, and how the shares become the whole again.

On one process all of it is the identity. Except for the first few, every process must call the
functions, in the same order. Nothing is caught: a process that fails ends with its message, and the launcher (`accelerate
launch`, `torchrun`) ends the others, who can only be waiting for it here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, distributed

from safediffusion.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")
# How long a process waits for another: the main one may write a model to a slow disk meanwhile.
PATIENCE = timedelta(hours=2)
_BUCKET = 2**25  # numbers that are summed at once: 128 MB


def accelerator(**options: Any) -> Accelerator:
    """The accelerator of this process, which under a launcher has found the others; `options` are accelerate's.

    Raises UserError where several processes were launched and cannot work together.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedType, InitProcessGroupKwargs

    # Accelerate starts no process group on a machine without an accelerator unless it is told: each process would believe to be alone.
    on_cpu = "LOCAL_RANK" in os.environ and not torch.accelerator.is_available()
    made = Accelerator(cpu=on_cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)], **options)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not _several():
        raise UserError(f"{os.environ['WORLD_SIZE']} processes were launched, and accelerate joins none on this device; run a single one, or launch with --cpu")
    if made.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise UserError(
            f"{made.distributed_type.value} settings of a launcher are not read: here the recipe splits a model over processes, by policy.shard = true; "
            "launch with --multi_gpu (docs/processes.md)"
        )
    asked = {
        "mixed precision": made.mixed_precision,
        "gradient accumulation": made.gradient_accumulation_steps,
        "dynamo": os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no"),
    }
    if told := next((f"{name} {value}" for name, value in asked.items() if str(value).lower() not in ("no", "1", "")), None):
        raise UserError(f"the launcher asks for {told}, and a run is to be what its recipe says (policy.dtype, policy.compile); leave it out of `accelerate config`")
    return made


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def index() -> int:
    return distributed.get_rank() if _several() else 0


def count() -> int:
    return distributed.get_world_size() if _several() else 1


def is_main() -> bool:
    """Whether this process is the one that writes files and speaks."""
    return index() == 0


def share(total: int) -> list[int]:
    """Which of `total` items this process works on: every count-th, so that a list sorted by cost is shared evenly.

    All shares are equally long, because nobody is ready before the last one: where that does not come out even, the
    last of a share is an item that another process has too, and `joined` leaves it out.
    """
    return [place % total for place in range(index(), -(-total // count()) * count(), count())] if total else []


def held(total: int) -> int:
    """How many of `share(total)`, counted from its start, no other process has."""
    return len(range(index(), total, count()))


def joined(own: Tensor, total: int) -> Tensor:
    """The whole `(total, ...)` in order, on every process, of what each made of its `share(total)`."""
    if not _several():
        return own
    here = own.to(_device()).contiguous()
    shares = [torch.empty_like(here) for _ in range(count())]
    distributed.all_gather(shares, here)
    return torch.stack(shares, 1).flatten(0, 1)[:total].to(own.device)


def summed(own: Tensor) -> Tensor:
    """The sum over processes, the same to the last bit on each; a new tensor."""
    if not _several():
        return own
    whole = own.to(_device(), copy=True).contiguous()
    distributed.all_reduce(whole)
    return whole.to(own.device)


def sum_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Make each gradient its sum over processes; one that no process has stays None."""
    if not _several():
        return
    users = summed(torch.tensor([float(p.grad is not None) for p in parameters]))
    used = [p for p, by in zip(parameters, users.tolist(), strict=True) if by]
    for p in used:
        if p.grad is None:  # this process had no share in the loss
            p.grad = torch.zeros_like(p)
    for bucket in _buckets(used):
        flat = summed(torch.cat([p.grad.flatten() for p in bucket]))
        for p, whole in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            p.grad.copy_(whole.view(p.shape))


def gathered(own: T) -> list[T]:
    """What each process has, in their order; small things that pickle."""
    if not _several():
        return [own]
    every: list[Any] = [None] * count()
    distributed.all_gather_object(every, own)
    return every


def from_main(work: Callable[[], T]) -> T:
    """What `work` gives on the main process, which alone does it; small things that pickle."""
    if not _several():
        return work()
    result: list[Any] = [work() if is_main() else None]
    distributed.broadcast_object_list(result)
    return result[0]


def in_turn(work: Callable[[], T]) -> T:
    """What `work` gives each process, one of a machine after the other: for what takes much of the memory that they share."""
    if not _several():
        return work()
    turns, own = (int(os.environ.get(name, default)) for name, default in (("LOCAL_WORLD_SIZE", count()), ("LOCAL_RANK", index())))
    for turn in range(int(max(gathered(turns)))):
        if turn == own:
            made = work()
        gathered(None)
    return made


def _device() -> torch.device:
    """Where tensors must lie to travel."""
    from accelerate import PartialState

    return PartialState().device


def _buckets(parameters: Sequence[torch.nn.Parameter]) -> list[list[torch.nn.Parameter]]:
    buckets: list[list[torch.nn.Parameter]] = []
    size = _BUCKET
    for parameter in parameters:
        if size + parameter.numel() > _BUCKET:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += parameter.numel()
    return buckets
