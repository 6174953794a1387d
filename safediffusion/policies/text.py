"""The text encoders of a pipeline and their tokenizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, eq=False)
class TextEncoders:
    """By the names of their parts in the pipeline: "tokenizer", "tokenizer_2", and frozen "text_encoder", ...; a part that is left out is missing."""

    tokenizers: Mapping[str, Any]
    encoders: Mapping[str, torch.nn.Module]

    def clip_length(self, number: str = "") -> int:
        """Tokens that fit into the CLIP encoder of that number ("" or "_2"): 77 for all known ones."""
        config: Any = self.encoders[f"text_encoder{number}"].config
        return min(self.tokenizers[f"tokenizer{number}"].model_max_length, config.max_position_embeddings)

    def tokens(self, prompts: Sequence[str], length: int, number: str = "") -> Any:
        """`input_ids` and `attention_mask`, `(B, length)`, cut or padded, on the device of the encoder of that number."""
        found = self.tokenizers[f"tokenizer{number}"](list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return found.to(self.encoders[f"text_encoder{number}"].device)

    def to(self, device: torch.device) -> TextEncoders:
        """The same, on a device."""
        return TextEncoders(self.tokenizers, {part: encoder.to(device) for part, encoder in self.encoders.items()})
