"""The CLIP encoder against transformers' own preprocessing and features, and what training relies on."""

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from safediffusion import weights
from safediffusion.encoders.clip import ClipEncoder, fitted
from safediffusion.errors import UserError

TEXTS = ["a red circle", "a dangerous picture of a skull", "two blue rings", "a knife and a green cross"]


@pytest.fixture(scope="session")
def encoder(clip_folder):
    return ClipEncoder.load(clip_folder)


@pytest.fixture
def broken(clip_folder, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(clip_folder, tmp_path / "broken")


def pictures(count, height=32, width=32):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(count))


def test_features_are_those_of_transformers(encoder, clip_folder):
    model = CLIPModel.from_pretrained(clip_folder, dtype=torch.float32).eval()
    tokens = CLIPTokenizer.from_pretrained(clip_folder)(TEXTS, padding=True, return_tensors="pt")
    images = pictures(3)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    with torch.no_grad():
        text = model.get_text_features(**tokens).pooler_output
        image = model.get_image_features(pixel_values=(images - mean) / std).pooler_output
    torch.testing.assert_close(encoder.text(TEXTS), F.normalize(text, dim=1), atol=1e-5, rtol=0)
    torch.testing.assert_close(encoder.image(images), F.normalize(image, dim=1), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(48, 48), (40, 64), (64, 40), (20, 31), (32, 32)])
def test_preprocessing_is_that_of_pil(height, width):
    # Middle grey, so that nothing overshoots: PIL also clips between its two passes, which no tensor resize does.
    pixels = np.random.default_rng(0).integers(64, 192, (height, width, 3), dtype=np.uint8)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    processor = CLIPImageProcessorPil(**size, do_normalize=False)
    expected = processor(Image.fromarray(pixels), return_tensors="pt").pixel_values[0]
    ours = fitted(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255, 32)[0]
    torch.testing.assert_close(ours, expected, atol=1.5 / 255, rtol=0)  # PIL rounds to whole pixel values


def test_a_picture_that_fits_is_not_resampled():
    images = pictures(2)
    assert fitted(images, 32) is images


def test_preprocessor_config_sets_the_normalisation(broken, encoder):
    (broken / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    ours = ClipEncoder.load(broken).image(pictures(1))
    features = encoder.model.get_image_features(pixel_values=pictures(1) * 2 - 1).pooler_output
    torch.testing.assert_close(ours, F.normalize(features, dim=1), atol=1e-6, rtol=0)


def test_unit_vectors_frozen_and_differentiable(encoder):
    images = pictures(2, 48, 40).requires_grad_()
    image, text = encoder.image(images), encoder.text(TEXTS)
    for z in (image, text):
        assert z.dtype == torch.float32
        torch.testing.assert_close(z.norm(dim=1), torch.ones(len(z)))
    (image[0] @ text[0]).backward()
    assert images.grad[0].abs().sum() > 0 and images.grad[1].abs().sum() == 0
    assert not encoder.model.training and not any(p.requires_grad for p in encoder.model.parameters())
    assert not text.requires_grad


def test_an_embedding_does_not_depend_on_its_company(clip_folder):
    many = [f"a red circle and {i} stars" for i in range(19)]
    together, alone = ClipEncoder.load(clip_folder), ClipEncoder.load(clip_folder)
    whole = together.text(many)
    for i in (0, 7, 18):
        assert torch.equal(alone.text([many[i]])[0], whole[i])


def test_texts_are_encoded_once(clip_folder):
    encoder = ClipEncoder.load(clip_folder)
    rows = []
    encoder.model.text_model.register_forward_hook(lambda module, given, output: rows.append(1))
    first = encoder.text(["a star", "a star", "a ring"])
    again = encoder.text(["a ring", "a star"])
    assert len(rows) == 1
    assert torch.equal(first[[2, 0]], again) and torch.equal(first[0], first[1])


def test_texts_cached_in_inference_mode_serve_gradients_later(clip_folder):
    encoder = ClipEncoder.load(clip_folder)
    with torch.inference_mode():
        encoder.text(TEXTS[:1])
    images = pictures(1).requires_grad_()
    (encoder.image(images) * encoder.text(TEXTS[:1])).sum().backward()
    assert images.grad.abs().sum() > 0


def test_autocast_changes_nothing(clip_folder):
    inside, outside = ClipEncoder.load(clip_folder), ClipEncoder.load(clip_folder)
    with torch.autocast("cpu", torch.bfloat16):
        text, image = inside.text(TEXTS), inside.image(pictures(2))
    assert torch.equal(text, outside.text(TEXTS)) and torch.equal(image, outside.image(pictures(2)))


def test_long_texts_are_cut_with_one_warning(clip_folder):
    encoder = ClipEncoder.load(clip_folder)
    long = "a red circle and " * 20
    with pytest.warns(UserWarning, match="2 of 3 texts are longer than the 24 tokens") as caught:
        z = encoder.text([long, "a star", long + "a skull"])
    assert len(caught) == 1
    assert torch.equal(z[0], z[2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.text([long])  # cached: said once


def test_half_precision_answers_in_float32(clip_folder, encoder):
    half = ClipEncoder.load(clip_folder, dtype=torch.bfloat16)
    assert half.model.dtype == torch.bfloat16
    for z, exact in ((half.text(TEXTS), encoder.text(TEXTS)), (half.image(pictures(2)), encoder.image(pictures(2)))):
        assert z.dtype == torch.float32
        assert (z * exact).sum(1).min() > 0.99


def test_half_precision_checkpoint_is_read_in_float32(broken, encoder):
    CLIPModel.from_pretrained(broken).half().save_pretrained(broken)
    assert ClipEncoder.load(broken).model.dtype == torch.float32


def test_identity_names_the_weights_not_the_place(broken, clip_folder, encoder):
    assert encoder.identity == f"tiny-clip sha256:{weights.sha256(clip_folder / 'model.safetensors')}"
    assert ClipEncoder.load(broken).identity.split()[1] == encoder.identity.split()[1]


def test_a_checkpoint_in_shards_is_the_same_model(broken, encoder):
    CLIPModel.from_pretrained(broken).save_pretrained(broken, max_shard_size="300KB")
    (broken / "model.safetensors").unlink()
    sharded = ClipEncoder.load(broken)
    assert len(sharded.weight_files) > 1
    assert torch.equal(sharded.text(TEXTS), encoder.text(TEXTS))


def damage_type(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "siglip"}))


def damage_shape(folder):
    tensors, metadata = weights.load(folder / "model.safetensors")
    del tensors["visual_projection.weight"]
    weights.save(folder / "model.safetensors", tensors, metadata)


def damage_weights(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:5000])


def damage_tokenizer(folder):
    for name in ("tokenizer.json", "vocab.json"):
        (folder / name).unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "does not exist"),
        (damage_type, "of type 'siglip'; the encoder must be a CLIPModel"),
        (damage_shape, "do not fit a CLIPModel of its shape: Missing key.*visual_projection"),
        (damage_weights, "cannot be read as safetensors"),
        (damage_tokenizer, "has no tokenizer"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read as JSON"),
    ],
)
def test_what_cannot_be_loaded_is_one_sentence(broken, damage, message):
    damage(broken)
    with pytest.raises(UserError, match=message) as raised:
        ClipEncoder.load(str(broken))
    assert "\n" not in str(raised.value)


def test_a_hub_id_without_network_asks_for_a_folder(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="give a local folder that holds the model instead"):
        ClipEncoder.load("nobody/no-such-clip")
