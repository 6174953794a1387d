"""Fixtures of the policies' tests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from safediffusion.policies.latent import LatentPolicy

CAPTIONS = ["a red cat and a blue dog", "a knife in a kitchen"]


@pytest.fixture
def edited(tiny_pipeline: Path, tmp_path: Path) -> Callable[..., Path]:
    """`edited(file, key=value)` is a copy of the tiny pipeline whose JSON `file` has other values for some keys."""

    def edit(file: str, **changes: Any) -> Path:
        folder = Path(shutil.copytree(tiny_pipeline, tmp_path / "edited"))
        config = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**config, **changes}))
        return folder

    return edit


@pytest.fixture
def train_a_step() -> Callable[[LatentPolicy, Tensor], None]:
    """`train_a_step(policy, latents)`, of which there are two, moves all that learns."""

    def train(policy: LatentPolicy, latents: Tensor) -> None:
        optimizer, time = torch.optim.AdamW(policy.parameters(), lr=1e-2), torch.tensor([977.5, 20.25])
        for _ in range(2):  # the first step moves only one of the two LoRA matrices
            policy.predict(latents, time, policy.encode(CAPTIONS)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    return train


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`folder_of(name)` is a folder of a model at random weights, never written to. Images of 32 px, CLIP's texts of 24 tokens, T5's of 16.

    UNets, latents (4, 8, 8): "sd21", "sdxl", and "sdxl-v", which encodes the empty prompt; "sdxl-square" has a pooled embedding as wide
    as its encoder, as all published ones. Flow transformers, latents (8, 8, 8): "sd3", "sd3-no-t5", "flux-dev", "flux-schnell".
    """

    @cache
    def build(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            builder = build_flow_pipeline if name.startswith(("sd3", "flux")) else build_unet_pipeline
            builder(name, folder).save_pretrained(folder)
        return folder

    return build


def build_flow_pipeline(name: str, folder: Path) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5Tokenizer

    from safediffusion.tiny import networks

    width = 104  # of the condition
    clip = networks.build_tokenizer(CAPTIONS, folder / "tokenizer")
    words = {f"▁{word}": -2.0 for caption in CAPTIONS for word in caption.split()}
    pieces = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, "▁": -2.0} | dict.fromkeys("abcdefghijklmnopqrstuvwxyz", -3.0) | words
    tokenizer = T5Tokenizer(vocab=list(pieces.items()), extra_ids=0, model_max_length=16)
    t5 = T5EncoderModel(T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"))
    if name.startswith("sd3"):
        transformer = SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=8,
            out_channels=8,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_projection_dim=32,
            joint_attention_dim=width,
            pooled_projection_dim=24 + 16,
            pos_embed_max_size=12,
            qk_norm="rms_norm",
            dual_attention_layers=(0,),
        )
        encoders = [build_clip(CLIPTextModelWithProjection, clip, *sizes) for sizes in ((32, 24), (64, 16))]
        third = (t5, tokenizer) if name == "sd3" else (None, None)
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        return StableDiffusion3Pipeline(transformer, scheduler, build_vae(), encoders[0], clip, encoders[1], clip, *third)
    dev = name == "flux-dev"
    transformer = FluxTransformer2DModel(
        in_channels=32,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=width,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=dev,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0 if dev else 1.0, use_dynamic_shifting=dev)
    return FluxPipeline(scheduler, build_vae(), build_clip(CLIPTextModel, clip, 32, 24), clip, t5, tokenizer, transformer)


def build_unet_pipeline(name: str, folder: Path) -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    from safediffusion.tiny import networks

    tokenizers = [networks.build_tokenizer(CAPTIONS, folder / part) for part in ("tokenizer", "tokenizer_2")]
    tokenizers[1].pad_token = "!" if "!" in tokenizers[1].get_vocab() else "a"  # as that of OpenCLIP, which does not pad by its last word
    prediction = "epsilon" if name.startswith("sdxl") and name != "sdxl-v" else "v_prediction"
    scheduler = DDIMScheduler.from_config(networks.scheduler().config, prediction_type=prediction)
    pooled = 64 if name == "sdxl-square" else 40
    sizes = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + pooled}
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        cross_attention_dim=64 if name == "sd21" else 32 + 64,
        norm_num_groups=8,
        use_linear_projection=True,
        **{} if name == "sd21" else sizes,
    )
    if name == "sd21":
        text = build_clip(CLIPTextModel, tokenizers[1], 64, pooled, "gelu")
        return StableDiffusionPipeline(networks.autoencoder(), text, tokenizers[1], unet, scheduler, None, None, requires_safety_checker=False)
    texts = build_clip(CLIPTextModel, tokenizers[0], 32, 24), build_clip(CLIPTextModelWithProjection, tokenizers[1], 64, pooled, "gelu")
    return StableDiffusionXLPipeline(networks.autoencoder(), *texts, *tokenizers, unet, scheduler, force_zeros_for_empty_prompt=name != "sdxl-v")


def build_clip(kind: Any, tokenizer: Any, width: int, projection: int, activation: str = "quick_gelu") -> Any:
    from transformers import CLIPTextConfig

    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=24,
            projection_dim=projection,
            hidden_act=activation,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_vae() -> Any:
    """With a shift, and without convolutions between it and the latents, as SD3 and FLUX have it."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16),
        latent_channels=8,
        norm_num_groups=8,
        scaling_factor=1.5,
        shift_factor=0.06,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
