"""A latent diffusion model as a policy: any diffusers folder of a family that `policies/families.py` names."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safediffusion import ranks
from safediffusion.errors import UserError
from safediffusion.hub import resolve_part
from safediffusion.policies import autoencoder
from safediffusion.policies.conditioner import Conditioner
from safediffusion.policies.denoiser import placed, placed_denoiser, trainable
from safediffusion.policies.embeddings import stored
from safediffusion.policies.families import find_family
from safediffusion.policies.family import Family
from safediffusion.policies.lora import merge_lora, save_lora
from safediffusion.policies.pipeline import load_denoiser, load_empty, load_model, load_text, read_config, weight_files, write_pipeline
from safediffusion.policies.precision import round_to
from safediffusion.policies.quantise import check_installed, check_trained
from safediffusion.policies.settings import PolicySettings
from safediffusion.policies.shard import check_shard
from safediffusion.policies.text import TextEncoders
from safediffusion.process.flow import tokens_in

_TINY_VAE = ("config.json", "diffusion_pytorch_model.safetensors")  # a repository holds other formats beside them
_MUCH = 0.05  # of what training changed, when a saved model is rounded


@dataclass(eq=False)
class LatentPolicy:
    """A latent diffusion model behind the Policy border. `load_policy` makes one.

    family: all that is particular to this kind of model.
    denoiser: the UNet or transformer as it is, with its adapters.
    encode: prompts to the condition `(B, L, D)`.
    network: what `predict` runs; `build.run` puts the one that accelerate has prepared here.
    trained: the weights that learn, by name; float32.
    sample_shape: of one latent, (C, h, w).
    scheduler_config: what the folder says of its noise schedule and prediction type, and the family adds, for the process.
    """

    folder: Path
    settings: PolicySettings
    device: torch.device
    family: Family
    denoiser: Any
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

        `time` is one of the process's, `(B,)` or a scalar. A guidance g other than 1 is classifier-free guidance, `u + g (c - u)`, in
        one forward of 2B; 1 runs the conditional branch alone. A tensor `(B,)`, on the CPU, gives every image its own;
        images with 1 have no unconditional branch then either. With `stop` no gradient flows through u.
        Of no image at all (B = 0) the network runs as often as of many: where it is sharded the others wait for that.
        """
        if not len(x):  # not every kernel takes an empty batch
            shape = (1, *x.shape[1:]), (1, *condition.shape[1:])
            return self.predict(x.new_zeros(shape[0]), time.new_zeros(1), condition.new_zeros(shape[1]), 1.0 if isinstance(guidance, Tensor) else guidance, stop)[:0]
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
        height, width = (side * autoencoder.cell(self.vae) for side in x.shape[-2:])
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.dtype == "bfloat16"):
            output = self.family.run(self.network, x, time, condition, (height, width), self.settings.embedded_guidance).float()
        return output

    def decode(self, x: Tensor) -> Tensor:
        """Images `(B, 3, H, W)` in [0, 1], float32, of the clean latents `x`; differentiable."""
        return autoencoder.decoded(self.vae, x)

    def sketch(self, x: Tensor) -> Tensor:
        """As `decode`, but by the tiny autoencoder where there is one: for the reward, not for people or measurements."""
        return autoencoder.decoded(self.tiny_vae or self.vae, x)

    def encode_images(self, images: Tensor) -> Tensor:
        """Clean latents `(B, C, h, w)`, float32: the mean of the autoencoder's posterior, in the scale the denoiser knows."""
        return autoencoder.encoded(self.vae, images)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Within it `predict` is the base model, without gradients: the weights of the folder, whatever was trained since.

        For LoRA the adapters are switched off; for full training a second denoiser is read on first use.
        """
        if self._at_base:
            yield
            return
        network, adapters = self.network, self.settings.train == "lora"
        if not adapters and self._base is None:
            self._base = placed(load_denoiser(self.family, self.folder), self.settings, self.device)
        if adapters:
            self.denoiser.disable_adapters()
        self.network, self._at_base = self.denoiser if adapters else self._base, True
        try:
            with torch.no_grad():
                yield
        finally:
            self.network, self._at_base = network, False
            if adapters:
                self.denoiser.enable_adapters()

    def tokens(self, shape: tuple[int, int, int] | None = None) -> int:
        """How many the network reads latents of this shape as, left out its own: by them some flows shift their times."""
        return tokens_in(shape or self.sample_shape, self.family.patch)

    @property
    def pixels(self) -> int:
        """Of a picture's width."""
        return self.sample_shape[-1] * autoencoder.cell(self.vae)

    @property
    def sharded(self) -> bool:
        """Whether several processes hold the base together: then all must run the same forwards and backwards in the same order."""
        return self.settings.shard and ranks.count() > 1

    def parameters(self) -> list[torch.nn.Parameter]:
        """The weights that learn, for the optimizer."""
        return list(self.trained.values())

    def state(self) -> dict[str, Tensor]:
        """The weights that learn, by name; not copies."""
        return {name: weight.detach() for name, weight in self.trained.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state`. Raises ValueError for a state of another model or other adapters."""
        _assign(self.trained, state)

    def save_pipeline(self, folder: Path, dtype: str | None = None) -> None:
        """A diffusers folder of the trained model, adapters merged; it replaces one that was saved there before.

        Its denoiser is rounded to `dtype`, with a warning where that takes much of what was learned; or to the precision that it has in the
        base model's folder, where that leaves what was learned, and kept in float32 otherwise.
        """
        if self.settings.train == "none":
            raise UserError('a model with policy.train = "none" is only painted with; load it with "full" to save it')
        denoiser, part = self._merged(), self.family.network
        lost = round_to(denoiser, weight_files(self.folder / part), None if dtype is None else getattr(torch, dtype))
        if lost > _MUCH and dtype is None:
            denoiser = self._merged()
        elif lost > _MUCH:
            warnings.warn(
                f"rounding takes {min(lost, 1.0):.0%} of what training changed in the {part}; export it with --dtype float32, or the adapters alone with --lora",
                stacklevel=2,
            )
        write_pipeline(denoiser, part, self.folder, folder)

    def _merged(self) -> Any:
        """A copy of the denoiser as it is trained, adapters merged; float32, on the CPU."""
        denoiser = trainable(self.family, self.folder, self.settings)
        _assign({name: denoiser.get_parameter(name) for name in self.trained}, self.state())
        if self.settings.train == "lora":
            merge_lora(denoiser)
        return denoiser

    def save_lora(self, folder: Path) -> None:
        """The adapters alone, for `load_lora_weights(folder)` of its diffusers pipeline."""
        if self.settings.train != "lora":
            raise UserError(f'a run with policy.train = "{self.settings.train}" has no LoRA to save; save the pipeline instead')
        save_lora(self.denoiser, self.family, folder)


def load_policy(
    folder: Path,
    settings: PolicySettings,
    device: str | torch.device = "cpu",
    texts: Sequence[str] = (),
    change: Callable[[Any, Conditioner], None] | None = None,
) -> LatentPolicy:
    """The policy of a diffusers folder. Raises UserError for one that is not whole or not supported.

    texts: what is going to be painted. Where text encoders are dropped the main process encodes it beforehand; with it all processes must call this.
    change: what is put onto the denoiser and the text encoders, in place, while the denoiser is still exact: before it is rounded or quantised.
    """
    from diffusers import AutoencoderKL, AutoencoderTiny

    check_trained(settings.quantise, settings.train)
    check_installed(settings.quantise)
    check_shard(settings)
    device = torch.device(device)
    family = find_family(folder)
    scheduler_config = read_config(folder / "scheduler", "scheduler_config.json") | dict(family.scheduler)
    vae = load_model(AutoencoderKL, folder / "vae")
    encode = _conditioner(family, folder, settings, device)
    if texts:
        ranks.from_main(lambda: encode.prepare(["", *texts]))
    denoiser = placed_denoiser(family, folder, settings, device, None if change is None else lambda exact: change(exact, encode))
    _check_fit(folder, family, vae, encode.text)
    tiny = None
    if settings.tiny_vae is not None:
        tiny = autoencoder.placed(load_model(AutoencoderTiny, resolve_part(settings.tiny_vae, _TINY_VAE)), settings.vae_dtype, device)
        autoencoder.check_tiny(settings.tiny_vae, tiny, vae)
    return LatentPolicy(
        folder=folder,
        settings=settings,
        device=device,
        family=family,
        denoiser=denoiser,
        vae=autoencoder.placed(vae, settings.vae_dtype, device, settings.vae_tile),
        encode=encode,
        sample_shape=latent_shape(folder, family, vae, settings.image_size),
        scheduler_config=scheduler_config,
        network=denoiser,
        trained={name: weight for name, weight in denoiser.named_parameters() if weight.requires_grad},
        tiny_vae=tiny,
    )


def latent_shape(folder: Path, family: Family, vae: Any, image_size: int | None) -> tuple[int, int, int]:
    """(C, h, w) of a latent for pictures of `image_size`, or of the model's own size. UserError for a size that does not fit or is not known."""
    channels, cell = family.channels[0], autoencoder.cell(vae)
    if image_size is not None:
        check_side(folder, family, vae, image_size, f"image_size = {image_size}")
        return channels, image_size // cell, image_size // cell
    if family.side is None:
        raise UserError(f"{folder / family.network} does not say the size of its images; set policy.image_size")
    height, width = (family.side, family.side) if isinstance(family.side, int) else family.side
    return channels, height, width


def check_side(folder: Path, family: Family, vae: Any, side: int, called: str) -> None:
    """UserError, which begins with what the side of a picture is `called`, where the model cannot paint one of so many pixels."""
    cell = autoencoder.cell(vae)
    if side % (cell * family.patch):
        raise UserError(f"{called} is not a multiple of {cell * family.patch}, the pixels that {folder} takes together")
    if family.largest is not None and side > cell * family.largest:
        raise UserError(f"{called} is more than {cell * family.largest}, the largest side that {folder} has positions for")


def _conditioner(family: Family, folder: Path, settings: PolicySettings, device: torch.device) -> Conditioner:
    dtype = getattr(torch, settings.dtype)
    if settings.text_encoders == "keep":
        return Conditioner(family, load_text(family, folder).to(device), dtype, settings.prompts_kept)
    with torch.device("meta"):
        shells = load_text(family, folder, load_empty)
    there = stored(family, folder, dtype, device)
    return Conditioner(family, shells, dtype, settings.prompts_kept, there, lambda: load_text(family, folder).to(device), device)


def _check_fit(folder: Path, family: Family, vae: Any, text: TextEncoders) -> None:
    taken, given = family.channels
    if not taken == given == vae.config.latent_channels:
        raise UserError(
            f"{folder}: the denoiser takes {taken} channels and gives {given}, but a latent has {vae.config.latent_channels}; "
            "an inpainting or learned-variance model is not supported"
        )
    if wrong := family.mismatch(text):
        raise UserError(f"{folder}: the {wrong}")
    if vae.config.latents_mean is not None:
        raise UserError(f"{folder}: the autoencoder scales each channel of a latent by itself, which is not supported")


def _assign(weights: dict[str, torch.nn.Parameter], values: dict[str, Tensor]) -> None:
    """Copy `values` into `weights`; ValueError unless names and shapes are the same."""
    shapes, found = ({name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in (weights, values))
    if wrong := sorted(dict(shapes.items() ^ found.items())):
        raise ValueError(f"the state does not fit this policy: {len(wrong)} weights are missing, unknown or of another shape, such as {wrong[0]}")
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(values[name])
