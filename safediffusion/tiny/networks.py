"""The architectures of the embedded world, all of them standard diffusers and transformers classes at small size."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, UNet2DConditionModel
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

CONTEXT = 24
_START, _END = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer(captions: list[str], folder: Path) -> CLIPTokenizer:
    """A CLIP byte-pair tokenizer whose merges are learned from `captions`; any other text falls back to bytes."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=760, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False)
    tokenizer.train_from_iterator(captions, trainer)
    state = json.loads(tokenizer.to_str())["model"]
    words = [*sorted(alphabet), *(letter + "</w>" for letter in sorted(alphabet))]
    words += [token for token in state["vocab"] if token not in set(words)]
    vocabulary = {word: index for index, word in enumerate([*words, _START, _END])}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in state["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    built = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=CONTEXT)
    built.save_pretrained(folder)
    return built


def _text_config(tokenizer: CLIPTokenizer, width: int, layers: int) -> dict:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 32,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(CLIPTextConfig(**_text_config(tokenizer, 96, 2)))


def clip(tokenizer: CLIPTokenizer, text_width: int, vision_width: int, layers: int) -> CLIPModel:
    vision = {
        "hidden_size": vision_width,
        "intermediate_size": 4 * vision_width,
        "num_hidden_layers": layers,
        "num_attention_heads": vision_width // 32,
        "image_size": 32,
        "patch_size": 4,
    }
    return CLIPModel(CLIPConfig(text_config=_text_config(tokenizer, text_width, layers), vision_config=vision, projection_dim=64))


def autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
        mid_block_add_attention=False,
    )


def unet() -> UNet2DConditionModel:
    """2.8 M parameters. Attention only at 4x4: there it sees every object, and the 8x8 level stays cheap (half the time)."""
    return UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 104),
        layers_per_block=1,
        cross_attention_dim=96,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def scheduler() -> DDIMScheduler:
    """The noise schedule of Stable Diffusion 1.x."""
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def sentence_encoder(encoder: CLIPTextModel, layers: int, scale: float) -> CLIPTextModelWithProjection:
    """The first `layers` layers of `encoder` as Stable Diffusion 3 wants its text encoders: with one layer more, whose states it never reads.

    That layer and the projection pass on what they get. All states are `scale` times those of `encoder`, which its layer norms
    undo: only who reads the states before a norm, as Stable Diffusion 3 does, sees it.
    """
    changed = {"num_hidden_layers": layers + 1, "projection_dim": encoder.config.hidden_size, "layer_norm_eps": encoder.config.layer_norm_eps * scale**2}
    config = encoder.config.to_dict() | changed
    network = CLIPTextModelWithProjection(CLIPTextConfig(**config))
    state = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    for name in state:
        if "embedding.weight" in name or ("layers." in name and ("out_proj" in name or "fc2" in name)):
            state[name] *= scale
    passing = f"encoder.layers.{layers}."
    for name, tensor in network.text_model.state_dict().items():
        if name.startswith(passing):
            state[name] = torch.zeros_like(tensor)
    network.text_model.load_state_dict({name: state[name] for name in network.text_model.state_dict()})
    with torch.no_grad():
        network.text_projection.weight.copy_(torch.eye(config["hidden_size"]))
    return network.eval()


def transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=5,
        num_attention_heads=4,
        attention_head_dim=32,
        qk_norm="rms_norm",
        joint_attention_dim=192,
        caption_projection_dim=128,
        pooled_projection_dim=192,
        pos_embed_max_size=4,
    )


def flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=1.5)
