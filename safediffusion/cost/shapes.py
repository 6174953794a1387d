"""What the parts of a model cost by their shapes alone: counted on tensors without contents, no weight is read.

FLOP are floating-point operations, a multiplication and an addition counting as two, as torch.utils.flop_counter has
them: one forward of the SD1.x denoiser at 512 pixels is 0.803 TFLOP (0.402 T multiply-adds). A backward is counted
from its own graph: twice the forward when all weights learn, little more than once for adapters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safediffusion.policies.autoencoder import cell, cut
from safediffusion.policies.families import find_family
from safediffusion.policies.latent import PolicySettings, latent_shape
from safediffusion.policies.lora import add_lora
from safediffusion.policies.pipeline import load_denoiser, load_empty, load_text
from safediffusion.policies.quantise import BITS
from safediffusion.policies.shard import gathered_bytes
from safediffusion.types import Prompt, Reward

_WIDTH = {"float32": 4, "bfloat16": 2}  # bytes of a number


@dataclass(frozen=True)
class Shapes:
    """Counts of one model; FLOP and activations are those of one image, all else is in whole numbers of weights or bytes."""

    latent: int  # numbers of one latent
    parameters: int  # of the denoiser, adapters left out
    trained: int  # weights that learn
    forward: int  # FLOP of the denoiser, one branch
    backward: int  # FLOP of its gradient
    decode: int  # FLOP of the autoencoder that decodes rollouts
    weights: int  # bytes of denoiser and autoencoder as they lie on the device
    text: int  # bytes of the text encoders, which run in float32
    condition: int  # bytes of what a prompt is encoded to
    base: int  # bytes of the second denoiser that full training compares with
    activations: int  # bytes kept for one backward
    decoding: int  # bytes of the widest place of the decoder, roughly
    painting: int  # bytes that the autoencoder which decodes rollouts keeps for one backward
    gathered: int  # bytes of frozen weights that a process has whole at a time where several hold them together


def measure_shapes(folder: Path, settings: PolicySettings) -> Shapes:
    """Those of a diffusers folder: its config files and tokenizers are read, no weight. Seconds for SD1.x. UserError for a pipeline that is not supported."""
    from diffusers import AutoencoderKL, AutoencoderTiny
    from torch._subclasses.fake_tensor import FakeTensorMode

    family = find_family(folder)
    with FakeTensorMode(allow_non_fake_inputs=True) as empty, torch.no_grad():
        denoiser, text = load_denoiser(family, folder, load_empty), load_text(family, folder, load_empty)
        vae = load_empty(AutoencoderKL, folder / "vae").requires_grad_(False)
        tiny = None if settings.tiny_vae is None else AutoencoderTiny.from_config(_tiny_config(settings.tiny_vae)).requires_grad_(False)
        condition = family.encode(text, [""])
    parameters = _count(denoiser)
    if settings.train == "lora":
        denoiser.requires_grad_(False)
        add_lora(denoiser, settings.lora_rank, settings.lora_alpha or settings.lora_rank, settings.lora_targets or family.lora_targets)
    trained = sum(weight.numel() for weight in denoiser.parameters() if weight.requires_grad)
    latent = (1, *latent_shape(folder, family, vae, settings.image_size))
    with empty:
        if settings.dtype == "bfloat16":
            _halve(denoiser)
        gathered = gathered_bytes(denoiser)
        size = latent[2] * cell(vae), latent[3] * cell(vae)

        def run() -> Tensor:
            return family.run(denoiser, torch.zeros(latent), torch.zeros(1), torch.zeros(condition.shape), size, settings.embedded_guidance)

        forward, backward, activations = _training(denoiser, run, settings)
        decode, decoding = _decoding(vae, latent)
        if tiny is not None:  # rollouts; what people look at is still decoded by the other one, whose place is the wider
            decode = counted(lambda: tiny.decode(torch.zeros(latent), return_dict=False))
        if settings.vae_tile is not None:
            cut(vae, settings.vae_tile)
        painting = _painting(tiny or vae, latent)
    if settings.gradient_checkpointing:
        backward += forward  # each block is computed once more on the way back
    base = parameters * _WIDTH[settings.dtype]
    # Autocast keeps a rounded copy of weights that learn.
    held = parameters * 4 + (base if settings.dtype == "bfloat16" else 0) if settings.train == "full" else base + trained * 4 - _saved(denoiser, settings)
    weights = held + 4 * sum(each.numel() for each in denoiser.buffers()) + _count(vae) * _WIDTH[settings.vae_dtype]
    spoken = 4 * sum(_count(encoder) for encoder in text.encoders.values())
    encoded = condition.numel() * _WIDTH[settings.dtype]
    tile = min(1.0, (settings.vae_tile or math.inf) / max(size)) ** 2
    widest, painting = (int(each * _WIDTH[settings.vae_dtype] / 4) for each in (decoding * tile, painting))
    return Shapes(math.prod(latent), parameters, trained, forward, backward, decode, weights, spoken, encoded, base, activations, widest, painting, gathered)


@torch.no_grad()
def reward_flop(reward: Reward, size: tuple[int, ...], device: torch.device) -> int:
    """FLOP of scoring one image of (height, width) pixels: a grey one is scored, its prompt encoded beforehand."""
    images, prompts = torch.full((1, 3, *size), 0.5, device=device), [Prompt("a picture")]
    reward(images, prompts)
    return counted(lambda: reward(images, prompts))


def counted(function: Callable[[], Any]) -> int:
    """The FLOP of a call."""
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

    # The counter knows the attention of GPUs; that of the CPU has the same shapes in the same places.
    forward, backward = (getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention_for_cpu{end}") for end in ("", "_backward"))
    own = {
        forward: lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value),
        backward: lambda gradient, query, key, value, *_, **__: sdpa_backward_flop_count(gradient, query, key, value),
    }
    with FlopCounterMode(display=False, custom_mapping=own) as counter:
        function()
    return int(counter.get_total_flops())


def _training(denoiser: Any, run: Callable[[], Tensor], settings: PolicySettings) -> tuple[int, int, int]:
    """FLOP of a forward and of its backward, and the bytes that wait between them: with checkpointing what goes into each block, and the inside of one."""
    kept: dict[int, Tensor] = {}
    own = {weight.untyped_storage()._cdata for weight in denoiser.parameters()}
    outputs: list[Tensor] = []
    widest = 0

    def block(run_block: Callable[..., Any], *inputs: Any) -> Any:
        nonlocal widest
        inside: dict[int, Tensor] = {}
        for each in inputs:
            if isinstance(each, Tensor):
                _into(kept)(each)
        with torch.autograd.graph.saved_tensors_hooks(_into(inside), lambda tensor: tensor):
            made = run_block(*inputs)
        widest = max(widest, _bytes(inside, own | kept.keys()))
        return made

    if settings.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing(block)

    def forward() -> None:
        with torch.autograd.graph.saved_tensors_hooks(_into(kept), lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=settings.dtype == "bfloat16"):
            outputs.append(run())

    once = counted(forward)
    held = _bytes(kept, own) + widest
    kept.clear()
    return once, counted(lambda: outputs.pop().float().sum().backward()), held


def _painting(vae: Any, latent: tuple[int, ...]) -> int:
    """Bytes that the graph of a decoded image keeps, float32. Tiles save nothing here: all are kept, and they overlap."""
    kept: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(_into(kept), lambda tensor: tensor):
        vae.decode(torch.zeros(latent, requires_grad=True), return_dict=False)
    return _bytes(kept, {weight.untyped_storage()._cdata for weight in vae.parameters()})


def _into(place: dict[int, Tensor]) -> Callable[[Tensor], Tensor]:
    """A hook that puts what a graph saves into `place`, each storage once."""

    def keep(tensor: Tensor) -> Tensor:
        place[tensor.untyped_storage()._cdata] = tensor
        return tensor

    return keep


def _bytes(tensors: Mapping[int, Tensor], elsewhere: Collection[int]) -> int:
    return sum(tensor.untyped_storage().nbytes() for place, tensor in tensors.items() if place not in elsewhere)


def _saved(denoiser: torch.nn.Module, settings: PolicySettings) -> int:
    """Bytes that frozen linear layers in few bits do not take."""
    if settings.quantise == "none":
        return 0
    frozen = [layer.weight for layer in denoiser.modules() if isinstance(layer, torch.nn.Linear) and not layer.weight.requires_grad]
    return int(sum(weight.numel() for weight in frozen) * (_WIDTH[settings.dtype] - BITS[settings.quantise] / 8))


@torch.no_grad()
def _decoding(vae: Any, latent: tuple[int, ...]) -> tuple[int, int]:
    """FLOP of a decoded image, and the bytes where its decoder is widest: input, output and the shortcut around them, float32."""
    widest = 0

    def look(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal widest
        tensors = [each for each in (*inputs, output) if isinstance(each, Tensor)]
        widest = max(widest, sum(each.numel() for each in tensors) + max((each.numel() for each in tensors), default=0))

    hooks = [module.register_forward_hook(look) for module in vae.decoder.modules() if not any(module.children())]
    flop = counted(lambda: vae.decode(torch.zeros(latent), return_dict=False))
    for hook in hooks:
        hook.remove()
    return flop, widest * 4


def _tiny_config(name: str) -> dict[str, Any]:
    """That of a local folder; one on the hub is taken to be a TAESD, whose shape is the class's own."""
    from diffusers import AutoencoderTiny

    return AutoencoderTiny.load_config(name) if Path(name).expanduser().is_dir() else {}


def _halve(denoiser: Any) -> None:
    """Linear and convolution layers in bfloat16, which a frozen one is kept in and autocast rounds the others to once."""
    for module in denoiser.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            for name, weight in list(module.named_parameters(recurse=False)):
                setattr(module, name, torch.nn.Parameter(weight.detach().bfloat16(), weight.requires_grad))


def _count(model: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())
