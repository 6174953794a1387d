"""Stable Diffusion 1.x and 2.x: a UNet that sees the last hidden states of one CLIP text encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from safediffusion.policies.text import TextEncoders


@dataclass(frozen=True)
class StableDiffusion:
    """Arithmetic of `StableDiffusionPipeline`. The condition is `(B, 77, D)`."""

    index: Mapping[str, Any]
    config: Mapping[str, Any]

    pipeline: ClassVar[str] = "StableDiffusionPipeline"
    parts: ClassVar[Mapping[str, str]] = {"text_encoder": "CLIPTextModel", "tokenizer": "CLIPTokenizer", "unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
    optional: ClassVar[tuple[str, ...]] = ()
    attention: ClassVar[None] = None
    network: ClassVar[str] = "unet"
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    lora_mixin: ClassVar[str] = "StableDiffusionLoraLoaderMixin"
    guidance: ClassVar[float] = 5.0
    scheduler: ClassVar[Mapping[str, Any]] = {}
    patch: ClassVar[int] = 1
    largest: ClassVar[None] = None
    empty_is_zero: ClassVar[bool] = False

    @property
    def channels(self) -> tuple[int, int]:
        return self.config.get("in_channels", 4), self.config.get("out_channels", 4)

    @property
    def side(self) -> int | Sequence[int] | None:
        return self.config.get("sample_size")

    @property
    def width(self) -> int:
        return self.config.get("cross_attention_dim", 1280)

    def mismatch(self, text: TextEncoders) -> str:
        given = text.encoders["text_encoder"].config.hidden_size
        return f"UNet expects a condition of width {self.width}, the text encoder gives {given}" if given != self.width else ""

    def room(self, text: TextEncoders) -> tuple[Any, int]:
        return text.tokenizers["tokenizer"], text.clip_length()

    def encode(self, text: TextEncoders, prompts: Sequence[str]) -> Tensor:
        encoder: Any = text.encoders["text_encoder"]
        tokens = text.tokens(prompts, text.clip_length())
        mask = tokens.attention_mask if getattr(encoder.config, "use_attention_mask", False) else None
        states: Tensor = encoder(tokens.input_ids, attention_mask=mask)[0]
        return states

    def run(self, network: Any, x: Tensor, time: Tensor, condition: Tensor, size: tuple[int, int], embedded_guidance: float) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)  # a quarter less time on a CPU
        output: Tensor = network(x, time, encoder_hidden_states=condition, return_dict=False)[0]
        return output
