"""HPS weights against a forward pass written as open_clip has it."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPTokenizer

from safediffusion.encoders.hps import load_hps, vit_h14
from safediffusion.errors import UserError

TEXTS = ["a red circle", "a skull above a green square"]


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))

    def forward(self, x, mask):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width, heads, layers):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 48, 8, 8, bias=False)
        self.class_embedding, self.positional_embedding = nn.Parameter(torch.randn(48)), nn.Parameter(torch.randn(17, 48))
        self.ln_pre, self.ln_post = nn.LayerNorm(48), nn.LayerNorm(48)
        self.transformer = Transformer(48, 4, 2)
        self.proj = nn.Parameter(torch.randn(48, 24))

    def forward(self, x):
        x = self.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenClip(nn.Module):
    def __init__(self, vocabulary):
        super().__init__()
        self.visual = Visual()
        self.token_embedding = nn.Embedding(vocabulary, 32)
        self.positional_embedding = nn.Parameter(torch.randn(24, 32))
        self.transformer = Transformer(32, 2, 3)
        self.ln_final = nn.LayerNorm(32)
        self.text_projection = nn.Parameter(torch.randn(32, 24))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))

    def text(self, tokens):
        mask = torch.full((tokens.shape[1],) * 2, float("-inf")).triu(1)
        x = self.transformer(self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]], mask)
        return self.ln_final(x)[torch.arange(len(x)), tokens.argmax(1)] @ self.text_projection


@pytest.fixture(scope="module")
def tokenizer(clip_folder):
    return CLIPTokenizer.from_pretrained(clip_folder)


@pytest.fixture(scope="module")
def reference(tokenizer):
    torch.manual_seed(0)
    model = OpenClip(len(tokenizer)).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1 and len(parameter) > 1:  # so that no bias or norm is at its trivial start
            parameter += 0.1 * torch.randn(parameter.shape)
    return model


@pytest.fixture(scope="module")
def config(tokenizer):
    shape = vit_h14().to_dict()
    text = shape["text_config"] | {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 128,
        "num_hidden_layers": 3, "num_attention_heads": 2, "max_position_embeddings": 24,
    }  # fmt: skip
    vision = shape["vision_config"] | {
        "hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)


def saved(tensors, folder):
    path = folder / "hps.safetensors"
    save_file(tensors, path)
    return path


def test_features_are_those_of_open_clip(reference, config, tokenizer, clip_folder, tmp_path):
    encoder = load_hps(saved(reference.state_dict(), tmp_path), clip_folder, config=config)
    images = torch.rand(3, 3, 32, 32)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    tokens = tokenizer(TEXTS, padding="max_length", max_length=24, return_tensors="pt").input_ids
    expected = F.normalize(reference.visual((images - mean) / std), dim=1)
    torch.testing.assert_close(encoder.image(images), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(encoder.text(TEXTS), F.normalize(reference.text(tokens), dim=1), atol=1e-5, rtol=0)
    assert encoder.identity.startswith("hps sha256:")


def test_the_tokenizer_may_lie_beside_the_weights(reference, config, tokenizer, clip_folder, tmp_path):
    path = saved(reference.state_dict(), tmp_path)
    with pytest.raises(UserError, match="has no tokenizer"):
        load_hps(path, config=config)
    tokenizer.save_pretrained(tmp_path)
    beside, elsewhere = load_hps(path, config=config), load_hps(path, clip_folder, config=config)
    assert torch.equal(beside.text(TEXTS), elsewhere.text(TEXTS))


def test_the_shape_is_that_of_vit_h14():
    config = vit_h14()
    assert (config.projection_dim, config.vision_config.image_size, config.text_config.max_position_embeddings) == (1024, 224, 77)
    assert config.text_config.hidden_act == config.vision_config.hidden_act == "gelu"
    assert config.text_config.eos_token_id == 2


def test_weights_are_read_strictly(reference, config, clip_folder, tmp_path):
    tensors = reference.state_dict()
    with pytest.raises(UserError, match=r"not an open_clip ViT: it has a tensor named 'visual\.extra'"):
        load_hps(saved(tensors | {"visual.extra": torch.zeros(1)}, tmp_path), clip_folder, config=config)
    missing = {name: tensor for name, tensor in tensors.items() if name != "transformer.resblocks.1.ln_1.bias"}
    with pytest.raises(UserError, match=r"Missing key.*layers\.1\.layer_norm1\.bias"):
        load_hps(saved(missing, tmp_path), clip_folder, config=config)


def test_a_pickle_is_refused_with_the_way_to_convert_it(clip_folder, tmp_path):
    with pytest.raises(UserError, match=r"pickle.*convert it once with: python -c .*weights_only=True"):
        load_hps(tmp_path / "HPS_v2.1_compressed.pt", clip_folder)


def test_a_missing_file_is_named(clip_folder, tmp_path):
    with pytest.raises(UserError, match=r"hps\.safetensors do not exist"):
        load_hps(tmp_path / "hps.safetensors", clip_folder)
