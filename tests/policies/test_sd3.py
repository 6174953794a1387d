"""What is particular to Stable Diffusion 3: three text encoders, of which the third may be missing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from safediffusion.errors import UserError
from safediffusion.policies.families import find_family
from safediffusion.policies.latent import PolicySettings, load_policy
from safediffusion.policies.pipeline import load_text

LORA = PolicySettings(lora_rank=4)
TEXTS = ["a red cat", "a blue dog in a kitchen"]


@pytest.fixture
def copied(flowing: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(flowing("sd3"), tmp_path / "copied"))


def edit(folder: Path, **parts: object) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | parts))


@pytest.mark.parametrize("name", ["sd3", "sd3-no-t5"])
def test_encoding_is_that_of_the_pipeline(flowing: Callable[[str], Path], name: str) -> None:
    length, missing = (16, {}) if name == "sd3" else (256, {"text_encoder_3": None, "tokenizer_3": None})
    encode = load_policy(flowing(name), LORA).encode
    pipeline = StableDiffusion3Pipeline.from_pretrained(flowing(name), **missing)
    with torch.no_grad():
        states, empty, pooled, empty_pooled = pipeline.encode_prompt(TEXTS, None, None, max_sequence_length=length)
    if name == "sd3-no-t5":  # one row of zeros stands for 256
        states, empty = states[:, :25], empty[:, :25]
    for ours, theirs, embedding in ((encode(TEXTS), states, pooled), (encode.unconditional.expand(2, -1, -1), empty, empty_pooled)):
        torch.testing.assert_close(ours[:, :-1], theirs, rtol=0, atol=1e-6)
        torch.testing.assert_close(ours[:, -1, :40], embedding, rtol=0, atol=1e-6)
        assert not ours[:, -1, 40:].any()


def test_prompts_are_cut_where_the_farthest_reader_ends(flowing: Callable[[str], Path]) -> None:
    for name, room in (("sd3", 16), ("sd3-no-t5", 24)):
        with pytest.warns(UserWarning, match=f"1 of 2 prompts have more than {room} tokens"):
            load_policy(flowing(name), LORA).encode(["a cat " * 30, "a red cat"])


def test_a_tokenizer_without_its_encoder_is_left_alone(copied: Path, flowing: Callable[[str], Path]) -> None:
    edit(copied, text_encoder_3=[None, None])
    without = load_policy(copied, LORA).encode(TEXTS)
    assert without.shape == load_policy(flowing("sd3-no-t5"), LORA).encode(TEXTS).shape == (2, 24 + 1 + 1, 104)


def test_encoders_that_do_not_fit_are_refused(copied: Path) -> None:
    family = find_family(copied)
    text = load_text(family, copied)
    assert family.mismatch(text) == ""
    for change, words in (
        ({"joint_attention_dim": 112}, "condition of width 112, T5 gives 104"),
        ({"joint_attention_dim": 88}, "condition of width 88, the two CLIP text encoders give 96"),
        ({"pooled_projection_dim": 48}, "pooled embeddings of width 48, the two CLIP text encoders give 40"),
    ):
        assert words in replace(family, config={**family.config, **change}).mismatch(text)
    shutil.rmtree(copied / "text_encoder_2")
    shutil.copytree(copied / "text_encoder", copied / "text_encoder_2")
    with pytest.raises(UserError, match="the transformer expects pooled embeddings of width 40, the two CLIP text encoders give 48"):
        load_policy(copied, LORA)


def test_only_t5_may_be_missing(copied: Path) -> None:
    edit(copied, text_encoder_2=[None, None])
    with pytest.raises(UserError, match="None as text_encoder_2; supported is CLIPTextModelWithProjection"):
        load_policy(copied, LORA)


@pytest.mark.parametrize("null", [[None, None], None])
def test_t5_without_its_tokenizer_is_half_a_part(copied: Path, null: list | None) -> None:
    edit(copied, tokenizer_3=null)
    with pytest.raises(UserError, match="has a text_encoder_3 and no tokenizer_3; fetch the model again"):
        find_family(copied)
    edit(copied, text_encoder_3=null)
    assert load_policy(copied, LORA).encode(["a red cat"]).shape[1] > 0


def test_pictures_are_whole_patches(flowing: Callable[[str], Path]) -> None:
    assert load_policy(flowing("sd3"), LORA).sample_shape == (8, 8, 8)
    with pytest.raises(UserError, match="image_size = 36 is not a multiple of 8"):
        load_policy(flowing("sd3"), PolicySettings(image_size=36))
