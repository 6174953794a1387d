"""HPSv2.1 (arXiv 2306.09341): a ViT-H/14 CLIP tuned on human preferences, stored with open_clip's names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from safediffusion.encoders.clip import ClipEncoder, clip_model, clip_tokenizer, read_weights
from safediffusion.errors import UserError

if TYPE_CHECKING:
    from transformers import CLIPConfig

_TOP = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
}
_TOWERS = {"transformer": "text_model.encoder.layers", "visual.transformer": "vision_model.encoder.layers"}
_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_TO_SAFETENSORS = (
    'python -c "import sys, torch; from safetensors.torch import save_file; '
    "save_file({k: v.contiguous() for k, v in torch.load(sys.argv[1], weights_only=True)['state_dict'].items()}, "
    'sys.argv[2])"'
)


def vit_h14() -> CLIPConfig:
    """The shape of open_clip's ViT-H-14, which HPSv2.1 has."""
    from transformers import CLIPConfig

    text = {
        "vocab_size": 49408,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
        # By this value transformers pools at the highest token of a text, its end, as open_clip does.
        "eos_token_id": 2,
    }
    vision = {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "patch_size": 14,
        "hidden_act": "gelu",
    }
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=1024)


def load_hps(
    path: str | Path,
    tokenizer: str | Path | None = None,
    *,
    config: CLIPConfig | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> ClipEncoder:
    """Read open_clip weights from a safetensors file.

    `tokenizer` is the folder of any CLIP with OpenAI's vocabulary; without one, its files lie beside the weights.
    Pictures are cut to their central square as CLIP does, where HPSv2's own code pads: the same for square pictures.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        convert = f"{_TO_SAFETENSORS} {path} {path.with_suffix('.safetensors')}"
        raise UserError(f"{path} may be a pickle, which can run code when it is read; convert it once with: {convert}")
    if not path.exists():
        raise UserError(f"the HPS weights {path} do not exist")
    model = clip_model(config or vit_h14(), from_open_clip(read_weights([path]), str(path)), str(path))
    return ClipEncoder(model.to(device, dtype), clip_tokenizer(Path(tokenizer or path.parent)), path.stem, [path])


def from_open_clip(tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """The tensors of an open_clip model under the names and in the layout of a transformers CLIPModel."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in _TOP:
            # open_clip multiplies by its projections from the right; a Linear holds the transpose.
            renamed[_TOP[name]] = tensor.T.contiguous() if name in ("visual.proj", "text_projection") else tensor
            continue
        tower, _, rest = name.partition(".resblocks.")
        layer, _, part = rest.partition(".")
        module, _, kind = part.rpartition(".")
        target = f"{_TOWERS.get(tower, '')}.{layer}"
        if tower in _TOWERS and module in _BLOCK:
            renamed[f"{target}.{_BLOCK[module]}.{kind}"] = tensor
        elif tower in _TOWERS and part in ("attn.in_proj_weight", "attn.in_proj_bias"):
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"{target}.self_attn.{letter}_proj.{kind.removeprefix('in_proj_')}"] = third
        else:
            raise UserError(f"{where} is not an open_clip ViT: it has a tensor named {name!r}")
    return renamed
