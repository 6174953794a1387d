"""Prompts to the text condition of a model, each text encoded once."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from safediffusion.policies.embeddings import SHARD, Embeddings
from safediffusion.policies.family import Family
from safediffusion.policies.text import TextEncoders

_BATCH = 8


@dataclass(eq=False)
class Conditioner:
    """The frozen text encoders of a model as its family uses them.

    text: the encoders; without contents where they are dropped.
    dtype: of the condition; the encoders themselves run in their own.
    capacity: texts kept, the least recently used leave first; 0 keeps none.
    stored: where conditions lie on disk when the encoders are dropped; `load` then brings those for as long as it takes to encode what is missing.
    """

    family: Family
    text: TextEncoders
    dtype: torch.dtype = torch.float32
    capacity: int = 4096
    stored: Embeddings | None = None
    load: Callable[[], TextEncoders] | None = None
    device: str | torch.device = "cpu"
    kept: OrderedDict[str, Tensor] = field(default_factory=OrderedDict, repr=False)
    measured: set[str] = field(default_factory=set, repr=False)  # texts whose length was looked at

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """The condition of each prompt, `(B, L, D)`.

        A prompt longer than the tokenizer takes is cut, and one warning counts them.
        """
        new = [text for text in dict.fromkeys(prompts) if text not in self.kept]
        self.warn_of_long(new)
        self.kept.update(self._made(new))
        condition = torch.stack([self.kept[text] for text in prompts])
        for text in prompts:
            self.kept.move_to_end(text)
        while len(self.kept) > self.capacity:
            self.kept.popitem(last=False)
        return condition

    @cached_property
    def unconditional(self) -> Tensor:
        """The condition of the branch without a prompt, `(1, L, D)`."""
        empty = self([""])
        return torch.zeros_like(empty) if self.family.empty_is_zero else empty

    def prepare(self, texts: Sequence[str]) -> None:
        """Put the conditions of `texts` on disk where the encoders are dropped: they are loaded for those that are not there, once for all."""
        if self.stored is None or self.load is None:
            return
        missing = self.stored.missing(texts)
        encoders = self.load() if missing else self.text
        for start in range(0, len(missing), SHARD):
            self.stored.write(self._encoded(encoders, missing[start : start + SHARD]))

    @torch.inference_mode(False)  # a condition made in a caller's inference mode would be kept, and fail in training
    def _made(self, texts: Sequence[str]) -> dict[str, Tensor]:
        if self.stored is None:
            return self._encoded(self.text, texts)
        self.prepare(texts)
        return {text: self.stored.read(text).to(self.device) for text in texts}

    @torch.no_grad()
    def _encoded(self, encoders: TextEncoders, texts: Sequence[str]) -> dict[str, Tensor]:
        """The condition `(L, D)` of each text.

        Always encoded in the same batch size, because a row's last bits may depend on it: a run that is resumed with nothing kept
        would else get other conditions than the run that was not interrupted.
        """
        made: dict[str, Tensor] = {}
        for start in range(0, len(texts), _BATCH):
            batch = texts[start : start + _BATCH]
            states = self.family.encode(encoders, [*batch, *[""] * (_BATCH - len(batch))]).to(self.dtype)
            made.update((text, row.clone()) for text, row in zip(batch, states, strict=False))  # a view would keep its whole batch in memory
        return made

    def warn_of_long(self, texts: Sequence[str]) -> None:
        """One warning that counts the prompts that will be cut, of those not looked at before: ask for all at once."""
        new = [text for text in dict.fromkeys(texts) if text not in self.measured]
        if new:
            self.measured.update(new)
            tokenizer, room = self.family.room(self.text)
            lengths = [len(ids) for ids in tokenizer(new, verbose=False).input_ids]
            if long := [text for text, length in zip(new, lengths, strict=True) if length > room]:
                shown = long[0] if len(long[0]) <= 40 else f"{long[0][:37]}..."
                warnings.warn(f"{len(long)} of {len(new)} prompts have more than {room} tokens ({shown!r}); the rest of them is cut", stacklevel=3)
