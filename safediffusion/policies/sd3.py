"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206): a flow transformer that sees two CLIP text encoders joined and, where it is there, T5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from safediffusion.policies.repeated_row import RepeatedRow
from safediffusion.policies.text import TextEncoders

_CLIPS = ("", "_2")
T5_LENGTH = 256  # tokens that the pipeline gives to T5, or rows of zeros without it


@dataclass(frozen=True)
class StableDiffusion3:
    """Arithmetic of `StableDiffusion3Pipeline`. The condition is `(B, 77 + 256 + 1, D)`: CLIP's states, T5's, the two pooled embeddings joined.

    Without T5 the pipeline has rows of zeros for it; here one stands for them all, and the condition is `(B, 77 + 1 + 1, D)`.
    """

    index: Mapping[str, Any]
    config: Mapping[str, Any]

    pipeline: ClassVar[str] = "StableDiffusion3Pipeline"
    parts: ClassVar[Mapping[str, str]] = {
        "text_encoder": "CLIPTextModelWithProjection",
        "tokenizer": "CLIPTokenizer",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "tokenizer_2": "CLIPTokenizer",
        "text_encoder_3": "T5EncoderModel",
        "tokenizer_3": "T5Tokenizer",
        "transformer": "SD3Transformer2DModel",
        "vae": "AutoencoderKL",
    }
    optional: ClassVar[tuple[str, ...]] = ("text_encoder_3", "tokenizer_3")
    network: ClassVar[str] = "transformer"
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    lora_mixin: ClassVar[str] = "SD3LoraLoaderMixin"
    guidance: ClassVar[float] = 5.0
    scheduler: ClassVar[Mapping[str, Any]] = {"even_sigmas": False}
    empty_is_zero: ClassVar[bool] = False

    @property
    def attention(self) -> RepeatedRow | None:
        return None if self._t5 else RepeatedRow(T5_LENGTH)

    @property
    def channels(self) -> tuple[int, int]:
        taken = self.config.get("in_channels", 16)
        return taken, self.config.get("out_channels", 16) or taken

    @property
    def side(self) -> int | Sequence[int] | None:
        return self.config.get("sample_size", 128)

    @property
    def patch(self) -> int:
        return self.config.get("patch_size", 2)

    @property
    def largest(self) -> int | None:
        tokens = self.config.get("pos_embed_max_size", 96)
        return tokens and self.patch * tokens

    @property
    def width(self) -> int:
        return self.config.get("joint_attention_dim", 4096)

    @property
    def _t5(self) -> bool:
        return (self.index.get("text_encoder_3") or [None])[0] is not None

    @property
    def _pooled(self) -> int:
        return self.config.get("pooled_projection_dim", 2048)

    def mismatch(self, text: TextEncoders) -> str:
        clips: list[Any] = [text.encoders[f"text_encoder{number}"].config for number in _CLIPS]
        joined, pooled = sum(clip.hidden_size for clip in clips), sum(clip.projection_dim for clip in clips)
        if pooled != self._pooled:
            return f"transformer expects pooled embeddings of width {self._pooled}, the two CLIP text encoders give {pooled}"
        if max(joined, pooled) > self.width:
            return f"transformer expects a condition of width {self.width}, the two CLIP text encoders give {max(joined, pooled)}"
        if self._t5 and (given := text.encoders["text_encoder_3"].config.d_model) != self.width:
            return f"transformer expects a condition of width {self.width}, T5 gives {given}"
        return ""

    def room(self, text: TextEncoders) -> tuple[Any, int]:
        tokenizer = text.tokenizers["tokenizer_3" if self._t5 else "tokenizer"]
        return tokenizer, min(T5_LENGTH, tokenizer.model_max_length) if self._t5 else text.clip_length()

    def encode(self, text: TextEncoders, prompts: Sequence[str]) -> Tensor:
        states, pooled = zip(*(self._clip(text, prompts, number) for number in _CLIPS), strict=True)
        joined, embedding = torch.cat(states, -1), torch.cat(pooled, -1)[:, None]
        if self._t5:
            third = text.encoders["text_encoder_3"](text.tokens(prompts, self.room(text)[1], "_3").input_ids)[0]
        else:
            third = torch.zeros_like(embedding)
        return torch.cat([pad(rows, (0, self.width - rows.shape[-1])) for rows in (joined, third, embedding)], 1)

    def run(self, network: Any, x: Tensor, time: Tensor, condition: Tensor, size: tuple[int, int], embedded_guidance: float) -> Tensor:
        states, pooled = condition[:, :-1], condition[:, -1, : self._pooled]
        output: Tensor = network(x, encoder_hidden_states=states, pooled_projections=pooled, timestep=time, return_dict=False)[0]
        return output

    def _clip(self, text: TextEncoders, prompts: Sequence[str], number: str) -> tuple[Tensor, Tensor]:
        """The states before the last layer and the projected embedding; both encoders read as many tokens as the first takes."""
        tokens = text.tokens(prompts, text.clip_length(), number)
        found: Any = text.encoders[f"text_encoder{number}"](tokens.input_ids, output_hidden_states=True)
        return found.hidden_states[-2], found.text_embeds
