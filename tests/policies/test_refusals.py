"""What `load_policy` does not take, one sentence for each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel
from transformers.utils import DummyObject

from safediffusion.errors import UserError
from safediffusion.policies.latent import PolicySettings, load_policy
from safediffusion.policies.pipeline import _load_tokenizer

FULL = PolicySettings(train="full")


def refusal(folder: Path, settings: PolicySettings = FULL) -> str:
    with pytest.raises(UserError) as caught:
        load_policy(folder, settings)
    message = str(caught.value)
    assert "\n" not in message
    assert ". " not in message
    return message


def test_folder_that_is_no_pipeline(tmp_path: Path) -> None:
    assert "has no model_index.json" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("file", "changes", "sentence"),
    [
        ("model_index.json", {"_class_name": "SanaPipeline"}, "is a SanaPipeline; supported are StableDiffusionPipeline"),
        ("model_index.json", {"unet": ["diffusers", "UNet1DModel"]}, "has UNet1DModel as unet; supported is UNet2DConditionModel"),
        ("unet/config.json", {"cross_attention_dim": 64}, "mismatched weights, such as down_blocks.1.attentions.0"),
        ("unet/config.json", {"layers_per_block": 2}, "missing weights, such as"),
        ("unet/config.json", {"in_channels": 9}, "mismatched weights, such as conv_in.weight"),
        ("text_encoder/config.json", {"num_hidden_layers": 1}, "unexpected weights, such as encoder.layers.1"),
        ("text_encoder/config.json", {"max_position_embeddings": 8}, "mismatched weights"),
        ("unet/config.json", {"sample_size": None}, "set policy.image_size"),
    ],
)
def test_folder_that_contradicts_itself(edited: Callable[..., Path], file: str, changes: dict[str, Any], sentence: str) -> None:
    assert sentence in refusal(edited(file, **changes))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weight_file_that_is_cut_short_incomplete_or_missing(tiny_pipeline: Path, tmp_path: Path, part: str) -> None:
    folder = Path(shutil.copytree(tiny_pipeline, tmp_path / "model"))
    (file,) = (folder / part).glob("*.safetensors")
    tensors, content = load_file(file), file.read_bytes()
    first = sorted(tensors)[0]
    save_file({name: value for name, value in tensors.items() if name != first}, file, metadata={"format": "pt"})
    assert refusal(folder).endswith(f"1 missing weights, such as {first}")
    file.write_bytes(content[: len(content) // 2])
    assert f"{folder / part} cannot be loaded" in refusal(folder)
    file.unlink()
    assert "no file named" in refusal(folder)


@pytest.mark.parametrize("file", ["unet/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer.json"])
def test_small_file_that_is_missing_or_broken(tiny_pipeline: Path, tmp_path: Path, file: str) -> None:
    folder = Path(shutil.copytree(tiny_pipeline, tmp_path / "model"))
    for other_form in ("vocab.json", "merges.txt"):  # of the tokenizer, which would do in the place of tokenizer.json
        (folder / "tokenizer" / other_form).unlink(missing_ok=True)
    (folder / file).write_text("{")
    assert str(folder / Path(file).parent) in refusal(folder)
    (folder / file).unlink()
    assert str(folder / Path(file).parent) in refusal(folder)


def test_tokenizer_whose_package_is_missing(tiny_pipeline: Path) -> None:
    class Sentences(metaclass=DummyObject):  # what transformers has in the place of a class that it cannot import
        _backends = ("pretty_midi",)

    with pytest.raises(UserError, match="cannot be loaded as Sentences: Sentences requires the pretty_midi library"):
        _load_tokenizer(Sentences, tiny_pipeline / "tokenizer")


def test_parts_of_different_models(tiny_pipeline: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_pipeline, tmp_path / "model"))
    config = json.loads((tiny_pipeline / "text_encoder" / "config.json").read_text())
    CLIPTextModel(CLIPTextConfig(**config | {"hidden_size": 48})).save_pretrained(folder / "text_encoder")
    assert "expects a condition of width 96, the text encoder gives 48" in refusal(folder)
    CLIPTextModel(CLIPTextConfig(**config | {"vocab_size": 10})).save_pretrained(folder / "text_encoder")
    assert "the text encoder knows 10" in refusal(folder)


def test_settings_that_do_not_fit_the_model(tiny_pipeline: Path) -> None:
    assert "no layer of the denoiser is called 'to_qq'" in refusal(tiny_pipeline, PolicySettings(lora_targets=("to_k", "to_qq")))
    assert "['to_q', 'norm1'] are not all linear" in refusal(tiny_pipeline, PolicySettings(lora_targets=("to_q", "norm1")))
    assert "image_size = 33 is not a multiple of 4" in refusal(tiny_pipeline, PolicySettings(image_size=33))
    assert load_policy(tiny_pipeline, PolicySettings(image_size=64)).sample_shape == (4, 16, 16)
