"""A frozen base that several processes hold together: of each block a share on every one, the whole of it only while it runs.

PyTorch's FSDP2 (`fully_shard`; the idea is ZeRO-3, arXiv 1910.02054). Adapters stay whole on every process, so that their gradients,
checkpoints and averages are what they are without it.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from safediffusion import ranks
from safediffusion.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from safediffusion.policies.settings import PolicySettings


def check_shard(settings: PolicySettings) -> None:
    """Raises UserError for a base that cannot be divided."""
    if not settings.shard:
        return
    if settings.train == "full":
        raise UserError('policy.shard divides frozen weights, and policy.train = "full" freezes none; train "lora", or leave policy.shard out')
    if settings.quantise != "none":
        raise UserError(f'policy.shard divides weights as they are, and policy.quantise = "{settings.quantise}" packs them in few bits; leave one of them out')
    if settings.compile:
        raise UserError("policy.shard fetches weights block by block, and policy.compile sees no blocks; leave one of them out")
    if not torch.distributed.is_available():
        raise UserError("policy.shard needs torch.distributed, which this torch was built without; install another build of it, or leave policy.shard out")
    from torch.distributed.fsdp import fully_shard

    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise UserError(f"policy.shard needs a newer torch than {torch.__version__}; update it, or leave policy.shard out")


def shared_mesh(settings: PolicySettings, device: torch.device) -> DeviceMesh | None:
    """Where the base is divided: over all processes; None where each holds all of it, as a lone one does. All processes must call it."""
    if not settings.shard or ranks.count() == 1:
        return None
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device.type, (ranks.count(),))


def units(network: Any) -> list[torch.nn.Module]:
    """What is fetched and let go as one, inner before outer: the blocks that diffusers says belong on one device, and at last the network with what is left."""
    blocks = network._no_split_modules or ()
    # A divided module is of a class that FSDP derives from the block's own.
    return [module for module in reversed(list(network.modules())) if module is network or any(kind.__name__ in blocks for kind in type(module).__mro__)]


def shard(network: Any, mesh: DeviceMesh, device: torch.device) -> None:
    """Divide the frozen weights of `network`, which lies on the CPU, and move it to the device; in place.

    One block after another moves, so that no device ever holds all of them. No process waits for another here.
    From now on every process must run the same forwards and backwards in the same order.
    """
    from torch.distributed.fsdp import fully_shard

    trained = {weight for weight in network.parameters() if weight.requires_grad}
    for unit in units(network):
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, ignored_params=trained)  # type: ignore[call-overload]
    for weight in trained:
        weight.data = weight.data.to(device)


def gathered_bytes(network: Any) -> int:
    """Of the frozen weights that a process has whole at a time: those outside of blocks; a block, the next one, and the buffer in which that arrives.

    Where a block holds blocks, as in a UNet, its own weights lie there beside theirs, and it is a little more. Of a divided network as of a whole one.
    """
    seen: set[torch.nn.Parameter] = set()
    sizes: list[int] = []
    for unit in units(network):
        own = [weight for weight in unit.parameters() if weight not in seen and not weight.requires_grad]
        seen.update(own)
        sizes.append(sum(weight.numel() * weight.element_size() for weight in own))
    *blocks, rest = sizes
    return rest + 3 * max(blocks, default=0)
