"""Prompts to the text condition of Stable Diffusion, each text encoded once."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

_BATCH = 8


@dataclass(eq=False)
class Conditioner:
    """A frozen CLIP text encoder as Stable Diffusion uses it: the last hidden states, padded to the full length L.

    dtype: of the condition; the encoder itself runs in its own.
    capacity: texts kept, the least recently used leave first; 0 keeps none.
    """

    tokenizer: Any
    text_encoder: Any
    dtype: torch.dtype = torch.float32
    capacity: int = 4096
    kept: OrderedDict[str, Tensor] = field(default_factory=OrderedDict, repr=False)
    measured: set[str] = field(default_factory=set, repr=False)  # texts whose length was looked at

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """The condition of each prompt, `(B, L, D)`.

        A prompt longer than the tokenizer takes is cut, and one warning counts them.
        """
        new = [text for text in dict.fromkeys(prompts) if text not in self.kept]
        self.warn_of_long(new)
        for start in range(0, len(new), _BATCH):
            texts = new[start : start + _BATCH]
            self.kept.update(zip(texts, self._encode(texts), strict=False))
        condition = torch.stack([self.kept[text] for text in prompts])
        for text in prompts:
            self.kept.move_to_end(text)
        while len(self.kept) > self.capacity:
            self.kept.popitem(last=False)
        return condition

    @cached_property
    def unconditional(self) -> Tensor:
        """The condition of the empty prompt, `(1, L, D)`."""
        return self([""])

    @property
    def length(self) -> int:
        """Tokens that fit, L: 77 for Stable Diffusion."""
        return min(self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings)

    @torch.inference_mode(False)  # a condition made in a caller's inference mode would be kept, and fail in training
    @torch.no_grad()
    def _encode(self, texts: Sequence[str]) -> list[Tensor]:
        """`_BATCH` conditions `(L, D)`, those of `texts` first.

        Always the same batch size, because a row's last bits may depend on it: a run that is resumed with nothing kept
        would else get other conditions than the run that was not interrupted.
        """
        padded = [*texts, *[""] * (_BATCH - len(texts))]
        tokens = self.tokenizer(padded, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt")
        tokens = tokens.to(self.text_encoder.device)
        mask = tokens.attention_mask if getattr(self.text_encoder.config, "use_attention_mask", False) else None
        states = self.text_encoder(tokens.input_ids, attention_mask=mask)[0].to(self.dtype)
        return [row.clone() for row in states]  # a view would keep its whole batch in memory

    def warn_of_long(self, texts: Sequence[str]) -> None:
        """One warning that counts the prompts that will be cut, of those not looked at before: ask for all at once."""
        new = [text for text in dict.fromkeys(texts) if text not in self.measured]
        if new:
            self.measured.update(new)
            lengths = [len(ids) for ids in self.tokenizer(new, verbose=False).input_ids]
            if long := sum(length > self.length for length in lengths):
                warnings.warn(f"{long} of {len(new)} prompts have more than {self.length} tokens; the rest of them is cut", stacklevel=3)
