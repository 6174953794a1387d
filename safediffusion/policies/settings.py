"""What is trained of a model, in which precision, and what is done to make it fit."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from pydantic import Field

from safediffusion.config import settings
from safediffusion.policies.quantise import Quantised

Precision = Literal["float32", "bfloat16"]


@settings
class PolicySettings:
    """What is trained and in which precision.

    train: "lora" trains adapters (about 3 M weights on SD1.x, and the reference is free); "full" the whole denoiser, UNet or transformer (860 M);
        "none" nothing: to paint and to measure, each layer of the denoiser as small as `dtype` and `quantise` say. No recipe has it.
    lora_rank, lora_alpha: the adapters' update is scaled by alpha / rank; alpha is the rank where it is left out.
    lora_targets: ends of the names of the layers that get adapters; where it is left out the projections of all attention, as the family names them.
    embedded_guidance: what a guidance-distilled model (FLUX.1-dev) is told at every call; others do not hear of it. `process.guidance` is beside it.
    dtype: of the denoiser's arithmetic; "bfloat16" is two to three times as fast on a GPU. Trained weights stay float32.
    tiny_vae: a small autoencoder (diffusers' AutoencoderTiny, such as madebyollin/taesd@REVISION or a local folder) that decodes the pictures
        of rollouts, for the reward alone: a fraction of the time and memory. What it does to the reward is measured when a run starts.
    quantise: keeps the frozen weights under the adapters in 8 ("int8", by torchao) or 4 bits ("nf4", by bitsandbytes). What is trained is
        adapters to the rounded base, which is the reference too; the model that is saved has them on the exact one.
    shard: under a launcher with several processes each holds a share of the frozen weights and fetches a block's whole when it runs: memory falls with the
        number of processes, every forward waits for the others. On one process it changes nothing. For "lora" without `quantise` or `compile`.
    vae_dtype: of the autoencoders'; "bfloat16" halves its memory and shifts a decoded image by a grey level here and there.
    vae_tile: pixels of a side of the tiles that pictures are decoded in, one picture at a time, overlapping by a quarter: a fraction of the
        memory at 1024 pixels, and seams that are not quite invisible. Pictures no larger than it are decoded whole.
    compile: fuses the denoiser's arithmetic by torch.compile, once for each shape and branch: a minute or two at the start, for long runs at few shapes.
    gradient_checkpointing: recomputes activations in the backward pass: less memory, about a third more time.
    prompt_cache: encoded prompts kept on the device, the latest; one takes 0.24 MB on SD1.x in float32, 2.7 MB on SD3 and 4.2 MB on FLUX in bfloat16.
        Left out, 4096, or 256 where text encoders are dropped, as conditions are then read from disk again. 0 keeps none.
    text_encoders: "drop" encodes the prompts of a run before anything else is loaded, keeps their conditions on disk (in the user's cache, by
        content) and frees the encoders, which for SD3 and FLUX take 22 GB; the same bits. A prompt that is not there loads them again.
    image_size: pixels of a side; the model's own where it is left out.
    """

    kind: Literal["latent"] = "latent"
    train: Literal["lora", "full", "none"] = "lora"
    lora_rank: int = Field(default=16, ge=1)
    lora_alpha: float | None = Field(default=None, gt=0)
    lora_targets: tuple[str, ...] | None = None
    embedded_guidance: float = Field(default=3.5, ge=0)
    dtype: Precision = "float32"
    quantise: Quantised = "none"
    shard: bool = False
    vae_dtype: Precision = "float32"
    vae_tile: int | None = Field(default=None, ge=64)
    tiny_vae: str | None = None
    compile: bool = False
    gradient_checkpointing: bool = False
    prompt_cache: int | None = Field(default=None, ge=0)
    text_encoders: Literal["keep", "drop"] = "keep"
    image_size: int | None = Field(default=None, ge=8)

    @property
    def prompts_kept(self) -> int:
        """Encoded prompts that stay on the device."""
        if self.prompt_cache is None:
            return 4096 if self.text_encoders == "keep" else 256
        return self.prompt_cache


@dataclass(frozen=True)
class Held:
    """How a model that only paints lies in memory; each as in `PolicySettings`. Text encoders that are dropped paint the same pictures."""

    dtype: Precision = "float32"
    quantise: Quantised = "none"
    text_encoders: Literal["keep", "drop"] = "keep"

    @property
    def changed(self) -> dict[str, str]:
        """What is not as usual."""
        return {field.name: getattr(self, field.name) for field in fields(self) if getattr(self, field.name) != field.default}

    @property
    def facts(self) -> dict[str, str]:
        """Those that decide a picture: an identity of before one could be chosen stays the same."""
        return {name: value for name, value in self.changed.items() if name != "text_encoders"}

    def settings(self, **others: Any) -> PolicySettings:
        """Of a policy that is as in its folder: an adapter, even at zero, would cost time, and weights that could learn stay in float32."""
        return PolicySettings(train="none", prompt_cache=256, dtype=self.dtype, quantise=self.quantise, text_encoders=self.text_encoders, **others)


EXACT = Held()
