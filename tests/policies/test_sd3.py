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
from safediffusion.evaluate.pictures import paint, pictures_of
from safediffusion.evaluate.rows import Row
from safediffusion.evaluate.task import Painting
from safediffusion.policies.families import find_family
from safediffusion.policies.latent import PolicySettings, load_policy
from safediffusion.policies.pipeline import load_text
from safediffusion.types import Prompt

LORA = PolicySettings(lora_rank=4)
TEXTS = ["a red cat", "a blue dog in a kitchen"]


@pytest.fixture
def copied(folder_of: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder_of("sd3"), tmp_path / "copied"))


def edit(folder: Path, **parts: object) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | parts))


@pytest.mark.parametrize("name", ["sd3", "sd3-no-t5"])
def test_encoding_is_that_of_the_pipeline(folder_of: Callable[[str], Path], name: str) -> None:
    length, missing = (16, {}) if name == "sd3" else (256, {"text_encoder_3": None, "tokenizer_3": None})
    encode = load_policy(folder_of(name), LORA).encode
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder_of(name), **missing)
    with torch.no_grad():
        states, empty, pooled, empty_pooled = pipeline.encode_prompt(TEXTS, None, None, max_sequence_length=length)
    if name == "sd3-no-t5":  # one row of zeros stands for 256
        states, empty = states[:, :25], empty[:, :25]
    for ours, theirs, embedding in ((encode(TEXTS), states, pooled), (encode.unconditional.expand(2, -1, -1), empty, empty_pooled)):
        torch.testing.assert_close(ours[:, :-1], theirs, rtol=0, atol=1e-6)
        torch.testing.assert_close(ours[:, -1, :40], embedding, rtol=0, atol=1e-6)
        assert not ours[:, -1, 40:].any()


def test_prompts_are_cut_where_the_farthest_reader_ends(folder_of: Callable[[str], Path]) -> None:
    for name, room in (("sd3", 16), ("sd3-no-t5", 24)):
        with pytest.warns(UserWarning, match=f"1 of 2 prompts have more than {room} tokens"):
            load_policy(folder_of(name), LORA).encode(["a cat " * 30, "a red cat"])


def test_a_tokenizer_without_its_encoder_is_left_alone(copied: Path, folder_of: Callable[[str], Path]) -> None:
    edit(copied, text_encoder_3=[None, None])
    without = load_policy(copied, LORA).encode(TEXTS)
    assert without.shape == load_policy(folder_of("sd3-no-t5"), LORA).encode(TEXTS).shape == (2, 24 + 1 + 1, 104)


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


def test_diffusers_must_be_told_that_there_is_no_t5(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    """As README says."""
    load_policy(folder_of("sd3-no-t5"), LORA).save_pipeline(tmp_path / "saved")
    for folder in (folder_of("sd3-no-t5"), tmp_path / "saved"):
        with pytest.raises(ValueError, match="text_encoder_3"):
            StableDiffusion3Pipeline.from_pretrained(folder)
        assert StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None).text_encoder_3 is None


@pytest.mark.parametrize("null", [[None, None], None])
def test_t5_without_its_tokenizer_is_half_a_part(copied: Path, null: list | None) -> None:
    edit(copied, tokenizer_3=null)
    with pytest.raises(UserError, match="has a text_encoder_3 and no tokenizer_3; fetch the model again"):
        find_family(copied)
    edit(copied, text_encoder_3=null)
    assert load_policy(copied, LORA).encode(["a red cat"]).shape[1] > 0


def test_pictures_are_whole_patches(folder_of: Callable[[str], Path]) -> None:
    assert load_policy(folder_of("sd3"), LORA).sample_shape == (8, 8, 8)
    with pytest.raises(UserError, match="image_size = 36 is not a multiple of 8"):
        load_policy(folder_of("sd3"), PolicySettings(image_size=36))


def test_pictures_larger_than_its_positions_are_refused(folder_of: Callable[[str], Path]) -> None:
    policy = load_policy(folder_of("sd3"), PolicySettings(image_size=96))
    x = torch.zeros(1, *policy.sample_shape)
    assert policy.predict(x, torch.tensor(500.0), policy.encode(["a cat"])).shape == x.shape
    with pytest.raises(UserError, match="image_size = 104 is more than 96, the largest side that .* has positions for"):
        load_policy(folder_of("sd3"), PolicySettings(image_size=104))
    (wide,) = pictures_of(Row("0", Prompt("a cat"), width=104, height=32), Painting(steps=2, size="row"), 32)
    with pytest.raises(UserError, match="a picture's side of 104 pixels is more than 96"):
        next(paint(policy, [wide], 1))
