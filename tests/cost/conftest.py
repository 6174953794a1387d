"""Shapes that are written in a second, one of each family."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from safediffusion.bench.shaped import Shape, write_shaped
from safediffusion.cost.blueprints import BLUEPRINTS, Blueprint

_CLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 800, "projection_dim": 32}
_T5 = {"vocab_size": 64, "d_model": 64, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "feed_forward_proj": "gated-gelu"}
_VAE = {
    "sample_size": 16,
    "block_out_channels": (32, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 4,
}
_UNET = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 4,
}
_SIZES = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 32}
_TRANSFORMER = {"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 64}
PARTS = {
    "sd15": {"unet": _UNET | {"cross_attention_dim": 32}, "text_encoder": _CLIP},
    "sdxl": {"unet": _UNET | _SIZES | {"cross_attention_dim": 64}, "text_encoder": _CLIP, "text_encoder_2": _CLIP},
    "sd35-medium": {
        "transformer": _TRANSFORMER
        | {"sample_size": 8, "in_channels": 4, "out_channels": 4, "caption_projection_dim": 32, "pooled_projection_dim": 64, "dual_attention_layers": (0,)},
        "text_encoder": _CLIP,
        "text_encoder_2": _CLIP,
    },
    "flux-dev": {
        "transformer": _TRANSFORMER | {"in_channels": 16, "num_single_layers": 1, "pooled_projection_dim": 32, "axes_dims_rope": (4, 6, 6), "guidance_embeds": True},
        "text_encoder": _CLIP,
        "text_encoder_2": _T5,
    },
}


def small(name: str) -> Shape:
    blueprint = BLUEPRINTS[name]
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    return Shape(Blueprint(blueprint.pipeline, (), PARTS[name] | {"vae": _VAE}, blueprint.scheduler), _CLIP, vision, projection=16)


@pytest.fixture(scope="session")
def small_shape(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`small_shape(name)` is the folder of a model of that family at a tiny size: `pipeline` and `reward`."""

    @cache
    def written(name: str) -> Path:
        return write_shaped(tmp_path_factory.mktemp("shapes") / name, small(name))

    return written
