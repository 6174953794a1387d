"""What the parts of a model cost by their shapes alone: counted on tensors without contents, no weight is read.

FLOP are floating-point operations, a multiplication and an addition counting as two, as torch.utils.flop_counter has
them: one forward of the SD1.x denoiser at 512 pixels is 0.803 TFLOP (0.402 T multiply-adds). A backward is counted
from its own graph: twice the forward when all weights learn, little more than once for adapters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safediffusion.policies.latent import PolicySettings
from safediffusion.policies.lora import add_lora
from safediffusion.policies.pipeline import check_pipeline
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
    weights: int  # bytes of denoiser, autoencoder and text encoder as they lie on the device
    base: int  # bytes of the second denoiser that full training compares with
    activations: int  # bytes kept for one backward
    decoding: int  # bytes of the widest place of the decoder, roughly


def measure_shapes(folder: Path, settings: PolicySettings) -> Shapes:
    """Those of a Stable Diffusion folder: its config files are read, nothing else. Seconds for SD1.x. UserError for another pipeline."""
    from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import CLIPTextConfig, CLIPTextModel

    check_pipeline(folder)
    with FakeTensorMode(allow_non_fake_inputs=True) as empty:
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae")).requires_grad_(False)
        text = CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder"))
        tiny = None if settings.tiny_vae is None else AutoencoderTiny.from_config(_tiny_config(settings.tiny_vae)).requires_grad_(False)
    parameters = _count(unet)
    if settings.train == "lora":
        unet.requires_grad_(False)
        add_lora(unet, settings.lora_rank, settings.lora_alpha or settings.lora_rank, settings.lora_targets)
    trained = sum(weight.numel() for weight in unet.parameters() if weight.requires_grad)
    latent = _latent(unet, vae, settings.image_size)
    with empty:
        if settings.dtype == "bfloat16":
            _halve(unet)
        length = text.config.max_position_embeddings
        forward, backward, activations = _training(unet, latent, (1, length, unet.config.cross_attention_dim), settings.dtype)
        decode, decoding = _decoding(vae, latent)
        if tiny is not None:  # rollouts; what people look at is still decoded by the other one, whose place is the wider
            decode = counted(lambda: tiny.decode(torch.zeros(latent), return_dict=False))
    if settings.gradient_checkpointing:  # each block is computed once more on the way back; what is kept is then overstated
        backward += forward
    base = parameters * _WIDTH[settings.dtype]
    # Autocast keeps a rounded copy of weights that learn.
    denoiser = parameters * 4 + (base if settings.dtype == "bfloat16" else 0) if settings.train == "full" else base + trained * 4
    weights = denoiser + _count(vae) * _WIDTH[settings.vae_dtype] + _count(text) * 4
    return Shapes(math.prod(latent), parameters, trained, forward, backward, decode, weights, base, activations, decoding * _WIDTH[settings.vae_dtype] // 4)


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


def _training(unet: Any, latent: tuple[int, ...], condition: tuple[int, ...], dtype: str) -> tuple[int, int, int]:
    """FLOP of a forward and of its backward, and the bytes that wait between them."""
    kept: dict[int, Tensor] = {}
    own = {weight.untyped_storage()._cdata for weight in unet.parameters()}
    outputs: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    def forward() -> None:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            outputs.append(unet(torch.zeros(latent), torch.zeros(1, dtype=torch.long), encoder_hidden_states=torch.zeros(condition), return_dict=False)[0])

    once = counted(forward)
    held = sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own)
    kept.clear()
    return once, counted(lambda: outputs.pop().float().sum().backward()), held


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


def _halve(unet: Any) -> None:
    """Linear and convolution layers in bfloat16, which a frozen one is kept in and autocast rounds the others to once."""
    for module in unet.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            for name, weight in list(module.named_parameters(recurse=False)):
                setattr(module, name, torch.nn.Parameter(weight.detach().bfloat16(), weight.requires_grad))


def _latent(unet: Any, vae: Any, image_size: int | None) -> tuple[int, ...]:
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    size = image_size // factor if image_size else unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return 1, unet.config.in_channels, height, width


def _count(model: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())
