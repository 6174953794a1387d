"""Stable Diffusion 1.x and 2.x as a policy: any diffusers folder with a UNet, an autoencoder and a CLIP text encoder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from safediffusion.config import settings
from safediffusion.errors import UserError
from safediffusion.hub import resolve_part
from safediffusion.policies.conditioner import Conditioner
from safediffusion.policies.lora import add_lora, merge_lora, save_lora
from safediffusion.policies.pipeline import check_pipeline, load_model, load_scheduler_config, load_tokenizer, write_pipeline

_TINY_VAE = ("config.json", "diffusion_pytorch_model.safetensors")  # a repository holds other formats beside them
Precision = Literal["float32", "bfloat16"]


@settings
class PolicySettings:
    """What is trained and in which precision.

    train: "lora" trains adapters (about 3 M weights on SD1.x, and the reference is free); "full" the whole UNet (860 M).
    lora_rank, lora_alpha: the adapters' update is scaled by alpha / rank; alpha is the rank where it is left out.
    lora_targets: ends of the names of the layers that get adapters; by default the projections of all attention.
    dtype: of the UNet's arithmetic; "bfloat16" is two to three times as fast on a GPU. Trained weights stay float32.
    tiny_vae: a small autoencoder (diffusers' AutoencoderTiny, such as madebyollin/taesd@REVISION or a local folder) that decodes the pictures
        of rollouts, for the reward alone: a fraction of the time and memory. What it does to the reward is measured when a run starts.
    vae_dtype: of the autoencoders'; "bfloat16" halves its memory and shifts a decoded image by a grey level here and there.
    compile: fuses the UNet's arithmetic by torch.compile, once for each shape and branch: a minute or two at the start, for long runs at few shapes.
    gradient_checkpointing: recomputes activations in the backward pass: less memory, about a third more time.
    prompt_cache: encoded prompts kept on the device; one takes 0.24 MB on SD1.x in float32. 0 keeps none.
    image_size: pixels of a side; the model's own where it is left out.
    """

    kind: Literal["latent"] = "latent"
    train: Literal["lora", "full"] = "lora"
    lora_rank: int = Field(default=16, ge=1)
    lora_alpha: float | None = Field(default=None, gt=0)
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    dtype: Precision = "float32"
    vae_dtype: Precision = "float32"
    tiny_vae: str | None = None
    compile: bool = False
    gradient_checkpointing: bool = False
    prompt_cache: int = Field(default=4096, ge=0)
    image_size: int | None = Field(default=None, ge=8)


@dataclass(eq=False)
class LatentPolicy:
    """A Stable Diffusion model behind the Policy border. `load_policy` makes one.

    encode: prompts to the condition `(B, L, D)`.
    network: what `predict` runs; `build.run` puts the one that accelerate has prepared here.
    trained: the weights that learn, by name; float32.
    sample_shape: of one latent, (C, h, w).
    scheduler_config: what the folder says of its noise schedule and prediction type, for `Diffusion.from_scheduler`.
    """

    folder: Path
    settings: PolicySettings
    device: torch.device
    unet: Any
    vae: Any
    encode: Conditioner
    sample_shape: tuple[int, int, int]
    scheduler_config: dict[str, Any]
    network: torch.nn.Module
    trained: dict[str, torch.nn.Parameter]
    tiny_vae: Any = None
    _base: Any = None
    _at_base: bool = False

    def predict(self, x: Tensor, time: Tensor, condition: Tensor, guidance: float | Tensor = 1.0, stop: bool = False) -> Tensor:
        """The network's raw output at the latents `x` `(B, C, h, w)`, in the scheduler's prediction type; float32.

        `time` is long, `(B,)` or a scalar. A guidance g other than 1 is classifier-free guidance, `u + g (c - u)`, in
        one forward of 2B; 1 runs the conditional branch alone. A tensor `(B,)`, on the CPU, gives every image its own;
        images with 1 have no unconditional branch then either. With `stop` no gradient flows through u.
        """
        time = time.to(x.device).expand(len(x))
        strength = torch.as_tensor(guidance, dtype=torch.float32).expand(len(x))
        guided = (strength != 1).nonzero().flatten()
        if len(guided) == 0:
            return self._forward(x, time, condition)
        strength, guided = strength[guided].view(-1, 1, 1, 1).to(x.device), guided.to(x.device)
        empty = self.encode.unconditional.expand_as(condition[guided])
        if stop:
            with torch.no_grad():
                unconditional = self._forward(x[guided], time[guided], empty)
            conditional = self._forward(x, time, condition)
        else:
            inputs = (torch.cat([whole[guided], whole]) for whole in (x, time))
            unconditional, conditional = self._forward(*inputs, torch.cat([empty, condition])).split([len(guided), len(x)])
        return conditional.index_copy(0, guided, unconditional + strength * (conditional[guided] - unconditional))

    def _forward(self, x: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)  # a quarter less time on a CPU
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.dtype == "bfloat16"):
            output: Tensor = self.network(x, time, encoder_hidden_states=condition, return_dict=False)[0].float()
        return output

    def decode(self, x: Tensor) -> Tensor:
        """Images `(B, 3, H, W)` in [0, 1], float32, of the clean latents `x`; differentiable."""
        return _decoded(self.vae, x)

    def sketch(self, x: Tensor) -> Tensor:
        """As `decode`, but by the tiny autoencoder where there is one: for the reward, not for people or measurements."""
        return _decoded(self.tiny_vae or self.vae, x)

    def encode_images(self, images: Tensor) -> Tensor:
        """Clean latents `(B, C, h, w)`, float32: the mean of the autoencoder's posterior, in the scale the UNet knows."""
        mean: Tensor = self.vae.encode((images * 2 - 1).to(self.vae.dtype)).latent_dist.mean.float()
        return (mean - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Within it `predict` is the base model, without gradients: the weights of the folder, whatever was trained since.

        For LoRA the adapters are switched off; for full training a second UNet is read on first use.
        """
        if self._at_base:
            yield
            return
        network, adapters = self.network, self.settings.train == "lora"
        if not adapters and self._base is None:
            self._base = _placed(_load_unet(self.folder), self.settings, self.device)
        if adapters:
            self.unet.disable_adapters()
        self.network, self._at_base = self.unet if adapters else self._base, True
        try:
            with torch.no_grad():
                yield
        finally:
            self.network, self._at_base = network, False
            if adapters:
                self.unet.enable_adapters()

    def parameters(self) -> list[torch.nn.Parameter]:
        """The weights that learn, for the optimizer."""
        return list(self.trained.values())

    def state(self) -> dict[str, Tensor]:
        """The weights that learn, by name; not copies."""
        return {name: weight.detach() for name, weight in self.trained.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state`. Raises ValueError for a state of another model or other adapters."""
        _assign(self.trained, state)

    def save_pipeline(self, folder: Path) -> None:
        """A diffusers folder of the trained model, adapters merged; it replaces one that was saved there before."""
        unet = _trainable_unet(self.folder, self.settings)
        _assign({name: unet.get_parameter(name) for name in self.trained}, self.state())
        if self.settings.train == "lora":
            merge_lora(unet)
        write_pipeline(unet, self.folder, folder)

    def save_lora(self, folder: Path) -> None:
        """The adapters alone, for `StableDiffusionPipeline.load_lora_weights(folder)`."""
        if self.settings.train != "lora":
            raise UserError('a run with policy.train = "full" has no LoRA to save; save the pipeline instead')
        save_lora(self.unet, folder)


def load_policy(folder: Path, settings: PolicySettings, device: str | torch.device = "cpu") -> LatentPolicy:
    """The policy of a Stable Diffusion folder. Raises UserError for one that is not whole or not supported."""
    from diffusers import AutoencoderKL, AutoencoderTiny
    from transformers import CLIPTextModel

    device = torch.device(device)
    check_pipeline(folder)
    scheduler_config = load_scheduler_config(folder / "scheduler")
    tokenizer = load_tokenizer(folder / "tokenizer")
    text_encoder = load_model(CLIPTextModel, folder / "text_encoder").to(device)
    vae = load_model(AutoencoderKL, folder / "vae")
    unet = _trainable_unet(folder, settings)
    _check_fit(folder, unet, vae, text_encoder, tokenizer)
    tiny = None
    if settings.tiny_vae is not None:
        tiny = _decoder(load_model(AutoencoderTiny, resolve_part(settings.tiny_vae, _TINY_VAE)), settings, device)
        _check_tiny(settings.tiny_vae, tiny, vae)
    if settings.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    unet = _placed(unet, settings, device)
    if settings.compile:
        unet.compile(dynamic=False)  # in place: names of weights, adapters and what is saved stay as they are
    return LatentPolicy(
        folder=folder,
        settings=settings,
        device=device,
        unet=unet,
        vae=_decoder(vae, settings, device),
        encode=Conditioner(tokenizer, text_encoder, getattr(torch, settings.dtype), settings.prompt_cache),
        sample_shape=_sample_shape(folder, unet, vae, settings.image_size),
        scheduler_config=scheduler_config,
        network=unet,
        trained={name: weight for name, weight in unet.named_parameters() if weight.requires_grad},
        tiny_vae=tiny,
    )


def _decoder(vae: Any, settings: PolicySettings, device: torch.device) -> Any:
    vae = vae.to(device)
    return vae if settings.vae_dtype == "float32" else vae.to(dtype=torch.bfloat16)  # to float32, which it is, diffusers would warn


def _decoded(vae: Any, x: Tensor) -> Tensor:
    scaled = x / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    images: Tensor = vae.decode(scaled.to(vae.dtype), return_dict=False)[0].float()
    return (images / 2 + 0.5).clamp(0, 1)


def _load_unet(folder: Path) -> Any:
    from diffusers import UNet2DConditionModel

    return load_model(UNet2DConditionModel, folder / "unet")


def _trainable_unet(folder: Path, settings: PolicySettings) -> Any:
    """The UNet of the folder, with either all its weights or its fresh adapters to be trained; float32, on the CPU."""
    unet = _load_unet(folder)
    if settings.train == "full":
        return unet.requires_grad_(True)
    add_lora(unet, settings.lora_rank, settings.lora_alpha or settings.lora_rank, settings.lora_targets)
    return unet


def _placed(unet: Any, settings: PolicySettings, device: torch.device) -> Any:
    """The UNet on its device, in the layout and precision in which it runs fastest there with the same result.

    Frozen linear and convolution layers are kept in the precision that autocast would round them to at each call; norms
    stay float32, as autocast runs them in it, so that policy and reference agree to the last bit.
    """
    for module in unet.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and not module.weight.requires_grad:
            module.to(dtype=getattr(torch, settings.dtype))
    return unet.to(device, memory_format=torch.channels_last)


def _check_fit(folder: Path, unet: Any, vae: Any, text_encoder: Any, tokenizer: Any) -> None:
    if not unet.config.in_channels == unet.config.out_channels == vae.config.latent_channels:
        raise UserError(
            f"{folder}: the UNet takes {unet.config.in_channels} channels and gives {unet.config.out_channels}, but a "
            f"latent has {vae.config.latent_channels}; an inpainting or learned-variance model is not supported"
        )
    if unet.config.cross_attention_dim != text_encoder.config.hidden_size:
        raise UserError(f"{folder}: the UNet expects a condition of width {unet.config.cross_attention_dim}, the text encoder gives {text_encoder.config.hidden_size}")
    if len(tokenizer) > text_encoder.config.vocab_size:
        raise UserError(f"{folder}: the tokenizer has {len(tokenizer)} words, the text encoder knows {text_encoder.config.vocab_size}")


def _check_tiny(name: str, tiny: Any, vae: Any) -> None:
    channels, pixels = tiny.config.latent_channels, 2 ** (len(tiny.config.decoder_block_out_channels) - 1)
    wanted, side = vae.config.latent_channels, 2 ** (len(vae.config.block_out_channels) - 1)
    if (channels, pixels) != (wanted, side):
        raise UserError(f"policy.tiny_vae: {name} decodes {channels} channels to {pixels} pixels per latent cell; the model's latents have {wanted}, and {side} pixels")


def _sample_shape(folder: Path, unet: Any, vae: Any, image_size: int | None) -> tuple[int, int, int]:
    factor = 2 ** (len(vae.config.block_out_channels) - 1)  # pixels per latent cell
    if image_size is not None:
        if image_size % factor:
            raise UserError(f"image_size = {image_size} is not a multiple of {factor}, the pixels per latent cell of {folder}")
        return unet.config.in_channels, image_size // factor, image_size // factor
    size = unet.config.sample_size
    if size is None:
        raise UserError(f"{folder / 'unet'} does not say the size of its images; set policy.image_size")
    height, width = (size, size) if isinstance(size, int) else size
    return unet.config.in_channels, height, width


def _assign(weights: dict[str, torch.nn.Parameter], values: dict[str, Tensor]) -> None:
    """Copy `values` into `weights`; ValueError unless names and shapes are the same."""
    shapes, found = ({name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in (weights, values))
    if wrong := sorted(dict(shapes.items() ^ found.items())):
        raise ValueError(f"the state does not fit this policy: {len(wrong)} weights are missing, unknown or of another shape, such as {wrong[0]}")
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(values[name])
