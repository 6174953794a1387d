"""FLUX.1: a flow transformer over packed latents that sees T5's states and CLIP's pooled embedding; [dev] is told its guidance, [schnell] has none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad, pixel_shuffle, pixel_unshuffle

from safediffusion.policies.text import TextEncoders

_T5_LENGTH = 512  # tokens that the pipeline gives to T5
_PATCH = 2  # cells of a latent that are one token
_TIMES = 1000  # the network multiplies its times by so many, so they are handed over divided, as FluxPipeline does


@dataclass(frozen=True)
class Flux:
    """Arithmetic of `FluxPipeline`. The condition is `(B, 512 + 1, D)`: T5's states, then CLIP's pooled embedding.

    Latents `(B, 16, h, w)` are packed for the network alone. Guidance by two branches is the pipeline's `true_cfg_scale`.
    """

    index: Mapping[str, Any]
    config: Mapping[str, Any]

    pipeline: ClassVar[str] = "FluxPipeline"
    parts: ClassVar[Mapping[str, str]] = {
        "text_encoder": "CLIPTextModel",
        "tokenizer": "CLIPTokenizer",
        "text_encoder_2": "T5EncoderModel",
        "tokenizer_2": "T5Tokenizer",
        "transformer": "FluxTransformer2DModel",
        "vae": "AutoencoderKL",
    }
    optional: ClassVar[tuple[str, ...]] = ()
    attention: ClassVar[None] = None
    network: ClassVar[str] = "transformer"
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    lora_mixin: ClassVar[str] = "FluxLoraLoaderMixin"
    guidance: ClassVar[float] = 1.0
    scheduler: ClassVar[Mapping[str, Any]] = {"even_sigmas": True}
    side: ClassVar[int] = 128  # the pipeline's own: nothing in the folder says it
    patch: ClassVar[int] = _PATCH
    largest: ClassVar[None] = None
    empty_is_zero: ClassVar[bool] = False

    @property
    def channels(self) -> tuple[int, int]:
        taken = self.config.get("in_channels", 64)
        return taken // _PATCH**2, (self.config.get("out_channels") or taken) // _PATCH**2

    @property
    def width(self) -> int:
        return self.config.get("joint_attention_dim", 4096)

    @property
    def _pooled(self) -> int:
        return self.config.get("pooled_projection_dim", 768)

    def mismatch(self, text: TextEncoders) -> str:
        clip, t5 = (text.encoders[part].config for part in ("text_encoder", "text_encoder_2"))
        if t5.d_model != self.width:
            return f"transformer expects a condition of width {self.width}, T5 gives {t5.d_model}"
        if clip.hidden_size != self._pooled:
            return f"transformer expects a pooled embedding of width {self._pooled}, the CLIP text encoder gives {clip.hidden_size}"
        return ""

    def room(self, text: TextEncoders) -> tuple[Any, int]:
        tokenizer = text.tokenizers["tokenizer_2"]
        return tokenizer, min(_T5_LENGTH, tokenizer.model_max_length)

    def encode(self, text: TextEncoders, prompts: Sequence[str]) -> Tensor:
        pooled: Tensor = text.encoders["text_encoder"](text.tokens(prompts, text.clip_length()).input_ids).pooler_output
        states: Tensor = text.encoders["text_encoder_2"](text.tokens(prompts, self.room(text)[1], "_2").input_ids)[0]
        return torch.cat([states, pad(pooled, (0, self.width - self._pooled))[:, None]], 1)

    def run(self, network: Any, x: Tensor, time: Tensor, condition: Tensor, size: tuple[int, int], embedded_guidance: float) -> Tensor:
        states, pooled = condition[:, :-1], condition[:, -1, : self._pooled]
        height, width = (cells // _PATCH for cells in x.shape[-2:])
        rows, columns = (torch.arange(count, device=x.device, dtype=x.dtype) for count in (height, width))
        output: Tensor = network(
            pixel_unshuffle(x, _PATCH).flatten(2).transpose(1, 2),  # (B, h/2 w/2, 4 C)
            encoder_hidden_states=states,
            pooled_projections=pooled,
            timestep=time / _TIMES,
            img_ids=torch.cartesian_prod(rows.new_zeros(1), rows, columns),
            txt_ids=x.new_zeros(states.shape[1], 3),
            guidance=x.new_full((len(x),), embedded_guidance) if self.config.get("guidance_embeds", False) else None,
            return_dict=False,
        )[0]
        return pixel_shuffle(output.transpose(1, 2).unflatten(2, (height, width)), _PATCH)
