"""What differs between families of models; all that they have in common is in `policies/latent.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

from torch import Tensor

from safediffusion.policies.text import TextEncoders


class Family(Protocol):
    """One leaf file each, a frozen dataclass over what a folder says of itself; `policies/families.py` names them.

    index, config: model_index.json, and config.json of the network; a key that diffusers has a default for may be missing.
    pipeline: the class that model_index.json names.
    parts: of the pipeline, and the class that is supported of each; those in `optional` may be null.
    network: the part that is trained.
    lora_targets: ends of the names of the layers that get adapters.
    lora_mixin: the class of diffusers.loaders whose `save_lora_weights` writes what `Pipeline.load_lora_weights` reads.
    attention: a processor that takes the place of those that diffusers gives the network, to compute the same in less time; None leaves them.
    guidance: classifier-free, as pictures are usually painted; 1, which is none, where the network was taught to do without.
    scheduler: what the pipeline asks of its scheduler beside the scheduler's own config, in the words of `process/`.
    """

    index: Mapping[str, Any]
    config: Mapping[str, Any]
    pipeline: ClassVar[str]
    parts: ClassVar[Mapping[str, str]]
    optional: ClassVar[tuple[str, ...]]
    network: ClassVar[str]
    lora_targets: ClassVar[tuple[str, ...]]
    lora_mixin: ClassVar[str]
    guidance: ClassVar[float]
    scheduler: ClassVar[Mapping[str, Any]]

    @property
    def attention(self) -> Any: ...
    @property
    def channels(self) -> tuple[int, int]:
        """Latent channels that the network takes and gives: those of an unpacked latent."""

    @property
    def side(self) -> int | Sequence[int] | None:
        """Cells of a latent's side, or its height and width, that the model was trained for; None where nothing says so."""

    @property
    def patch(self) -> int:
        """A latent's sides are multiples of so many cells; of a transformer each token is so many cells wide and high."""

    @property
    def largest(self) -> int | None:
        """Cells of a latent's side that the network has positions for; None where there is no such bound."""

    @property
    def width(self) -> int:
        """D of the condition: what the network's attention to the text takes. A pooled embedding must fit in."""

    @property
    def empty_is_zero(self) -> bool:
        """The unconditional branch sees zeros rather than the empty prompt."""

    def mismatch(self, text: TextEncoders) -> str:
        """What is wrong with these text encoders for this network, after "the"; "" where they fit. Only configs are looked at."""

    def room(self, text: TextEncoders) -> tuple[Any, int]:
        """The tokenizer that reads farthest, and the tokens that fit: a prompt is cut where it is longer."""

    def encode(self, text: TextEncoders, prompts: Sequence[str]) -> Tensor:
        """The condition `(B, L, D)`, in the encoders' precision: token states, then a pooled embedding, where there is one, as a last row padded with zeros."""

    def run(self, network: Any, x: Tensor, time: Tensor, condition: Tensor, size: tuple[int, int], embedded_guidance: float) -> Tensor:
        """The raw output of `network` `(B, C, h, w)` for latents `x` of that shape, times `(B,)` as the process has them, a condition `(B, L, D)`.

        size: height and width of the picture in pixels. embedded_guidance: for networks that take guidance as an input.
        `network` may be wrapped, so its config is asked of `self.config`.
        """
