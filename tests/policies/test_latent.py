"""Our Stable Diffusion policy against diffusers' own pipeline on the same folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from safediffusion.errors import UserError
from safediffusion.policies.latent import LatentPolicy, PolicySettings, load_policy

FULL, LORA = PolicySettings(train="full"), PolicySettings(train="lora", lora_rank=4, lora_alpha=8.0)
TEXTS = ["a red cat", "a blue dog in a kitchen"]
TIME = torch.tensor([981, 20])


@pytest.fixture(scope="module")
def pipeline(tiny_pipeline: Path) -> Any:
    return StableDiffusionPipeline.from_pretrained(tiny_pipeline, safety_checker=None)


@pytest.fixture(scope="module")
def latents() -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def predict(policy: LatentPolicy, latents: Tensor, guidance: float = 1.0) -> Tensor:
    with torch.no_grad():
        return policy.predict(latents, TIME, policy.encode(TEXTS), guidance)


def diffusers_predict(pipeline: Any, latents: Tensor) -> Tensor:
    condition = pipeline.encode_prompt(TEXTS, "cpu", 1, False)[0]
    with torch.no_grad():
        return pipeline.unet(latents, TIME, encoder_hidden_states=condition).sample


def train_a_step(policy: LatentPolicy, latents: Tensor) -> None:
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    for _ in range(2):  # the first step moves only one of the two LoRA matrices
        policy.predict(latents, TIME, policy.encode(TEXTS)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def edited(folder: Path, target: Path, file: str, **changes: Any) -> Path:
    """A copy of the pipeline whose JSON `file` has other values for some keys."""
    shutil.copytree(folder, target)
    config = json.loads((target / file).read_text())
    (target / file).write_text(json.dumps({**config, **changes}))
    return target


# The same numbers as diffusers


def test_encoding_is_that_of_the_pipeline(tiny_pipeline: Path, pipeline: Any) -> None:
    encode = load_policy(tiny_pipeline, LORA).encode
    with torch.no_grad():
        condition, unconditional = pipeline.encode_prompt(TEXTS, "cpu", 1, True)
    assert encode(TEXTS).shape == (2, 24, 96)
    torch.testing.assert_close(encode(TEXTS), condition)
    torch.testing.assert_close(encode.unconditional.expand(2, -1, -1), unconditional)
    assert not encode(TEXTS).requires_grad


@pytest.mark.parametrize("settings", [FULL, LORA])
def test_guided_prediction_is_that_of_the_pipeline(tiny_pipeline: Path, pipeline: Any, latents: Tensor, settings: PolicySettings) -> None:
    policy = load_policy(tiny_pipeline, settings)
    condition, unconditional = pipeline.encode_prompt(TEXTS, "cpu", 1, True)
    with torch.no_grad():
        both = pipeline.unet(torch.cat([latents] * 2), TIME.repeat(2), encoder_hidden_states=torch.cat([unconditional, condition])).sample
    u, c = both.chunk(2)
    torch.testing.assert_close(predict(policy, latents, 5.0), u + 5.0 * (c - u))
    torch.testing.assert_close(predict(policy, latents, 0.0), u)
    torch.testing.assert_close(predict(policy, latents), c)


def test_scalar_time_is_the_time_of_all(tiny_pipeline: Path, latents: Tensor) -> None:
    policy = load_policy(tiny_pipeline, LORA)
    condition = policy.encode(TEXTS)
    for guidance in (1.0, 3.0):
        each = policy.predict(latents, torch.tensor([7, 7]), condition, guidance)
        torch.testing.assert_close(policy.predict(latents, torch.tensor(7), condition, guidance), each)


def test_decoding_is_that_of_the_pipeline(tiny_pipeline: Path, pipeline: Any, latents: Tensor) -> None:
    policy = load_policy(tiny_pipeline, LORA)
    with torch.no_grad():
        expected = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    expected = pipeline.image_processor.postprocess(expected, output_type="pt")
    latents = latents.clone().requires_grad_()
    images = policy.decode(latents)
    assert images.shape == (2, 3, 32, 32)
    torch.testing.assert_close(images.detach(), expected)
    images.sum().backward()
    assert latents.grad is not None and latents.grad.abs().sum() > 0


def test_images_are_encoded_into_the_scale_of_the_unet(tiny_pipeline: Path, pipeline: Any) -> None:
    policy, images = load_policy(tiny_pipeline, LORA), torch.rand(2, 3, 32, 32)
    expected = pipeline.vae.encode(pipeline.image_processor.preprocess(images)).latent_dist.mode() * pipeline.vae.config.scaling_factor
    assert policy.sample_shape == (4, 8, 8)
    torch.testing.assert_close(policy.encode_images(images), expected)


def test_shift_of_the_autoencoder_is_undone(tiny_pipeline: Path, tmp_path: Path) -> None:
    images = torch.rand(1, 3, 32, 32)
    plain = load_policy(tiny_pipeline, LORA)
    shifted = load_policy(edited(tiny_pipeline, tmp_path / "shifted", "vae/config.json", shift_factor=0.5), LORA)
    torch.testing.assert_close(shifted.encode_images(images), plain.encode_images(images) - 0.5 * plain.vae.config.scaling_factor)
    torch.testing.assert_close(shifted.decode(shifted.encode_images(images)), plain.decode(plain.encode_images(images)))


def test_v_prediction_folder(tiny_pipeline: Path, tmp_path: Path, latents: Tensor) -> None:
    folder = edited(tiny_pipeline, tmp_path / "v", "scheduler/scheduler_config.json", prediction_type="v_prediction")
    policy = load_policy(folder, LORA)
    assert policy.scheduler_config["prediction_type"] == "v_prediction"
    assert torch.equal(predict(policy, latents), predict(load_policy(tiny_pipeline, LORA), latents))  # the output stays raw


# Prompts


def test_condition_does_not_depend_on_its_batch_or_on_what_is_kept(tiny_pipeline: Path) -> None:
    encode = load_policy(tiny_pipeline, PolicySettings(prompt_cache=3)).encode
    texts = [f"a {colour} {thing}" for colour in ("red", "blue", "green") for thing in ("cat", "dog", "bat", "cup")]
    together = encode(texts)
    assert len(encode.kept) == 3
    assert torch.equal(together, torch.cat([encode([text]) for text in texts]))
    assert torch.equal(encode([texts[3], texts[3]]), together[[3, 3]])


def test_most_recently_used_prompts_are_kept(tiny_pipeline: Path) -> None:
    encode = load_policy(tiny_pipeline, PolicySettings(prompt_cache=2)).encode
    for text in ("a", "b", "a", "c"):
        encode([text])
    assert list(encode.kept) == ["a", "c"]


def test_condition_made_in_inference_mode_can_be_trained_with(tiny_pipeline: Path, latents: Tensor) -> None:
    policy = load_policy(tiny_pipeline, LORA)
    with torch.inference_mode():
        policy.encode([*TEXTS, ""])
    train_a_step(policy, latents)


def test_long_prompts_are_counted_in_one_warning(tiny_pipeline: Path, pipeline: Any) -> None:
    encode, long = load_policy(tiny_pipeline, LORA).encode, "cat and " * 30
    with pytest.warns(UserWarning, match="2 of 3 prompts have more than 24 tokens") as caught:
        condition = encode([long, long + "dog", "a cat"])
    assert len(caught) == 1
    torch.testing.assert_close(condition[:1], pipeline.encode_prompt(long, "cpu", 1, False)[0].detach())


# Training


@pytest.mark.parametrize("settings", [FULL, LORA])
def test_reference_stays_the_base_model(tiny_pipeline: Path, latents: Tensor, settings: PolicySettings) -> None:
    policy = load_policy(tiny_pipeline, settings)
    before = predict(policy, latents)
    train_a_step(policy, latents)
    after = predict(policy, latents)
    assert (after - before).abs().max() > 1e-3
    for _ in range(2):
        with policy.reference(), policy.reference():
            reference = policy.predict(latents, TIME, policy.encode(TEXTS))
        assert torch.equal(reference, before) and not reference.requires_grad
        assert torch.equal(predict(policy, latents), after)
    assert all(weight.requires_grad for weight in policy.parameters())


def test_adapters_start_at_the_base_model_and_are_the_same_in_every_process(tiny_pipeline: Path, latents: Tensor) -> None:
    state = torch.random.get_rng_state()
    one, two, full = (load_policy(tiny_pipeline, settings) for settings in (LORA, LORA, FULL))
    assert torch.equal(predict(one, latents), predict(full, latents))
    assert all(torch.equal(value, two.state()[name]) for name, value in one.state().items())
    assert sum(weight.numel() for weight in one.parameters()) < 0.1 * sum(weight.numel() for weight in full.parameters())
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("settings", [FULL, LORA])
def test_state_brings_back_the_trained_model_and_not_its_reference(tiny_pipeline: Path, latents: Tensor, settings: PolicySettings) -> None:
    trained, resumed = load_policy(tiny_pipeline, settings), load_policy(tiny_pipeline, settings)
    train_a_step(trained, latents)
    resumed.load_state({name: value.clone() for name, value in trained.state().items()})
    assert torch.equal(predict(resumed, latents), predict(trained, latents))
    with trained.reference(), resumed.reference():
        assert torch.equal(predict(resumed, latents), predict(trained, latents))
    with pytest.raises(ValueError, match="does not fit this policy: 1 weights"):
        resumed.load_state(dict(list(trained.state().items())[1:]))
    with pytest.raises(ValueError, match="does not fit this policy"):
        resumed.load_state({name: value[:1] for name, value in trained.state().items()})


def test_wrapped_network_is_the_one_that_runs(tiny_pipeline: Path, latents: Tensor) -> None:
    policy, calls = load_policy(tiny_pipeline, LORA), []

    class Wrapped(torch.nn.Module):
        def forward(self, *arguments: Any, **options: Any) -> Any:
            calls.append(len(arguments[0]))
            return policy.unet(*arguments, **options)

    policy.network = Wrapped()
    predict(policy, latents, guidance=2.0)
    with policy.reference():
        predict(policy, latents)
    assert calls == [4] and isinstance(policy.network, Wrapped)


@pytest.mark.parametrize("train", ["full", "lora"])
def test_bfloat16_computes_in_bfloat16_and_trains_in_float32(tiny_pipeline: Path, latents: Tensor, train: Any) -> None:
    policy = load_policy(tiny_pipeline, PolicySettings(train=train, dtype="bfloat16", vae_dtype="bfloat16", gradient_checkpointing=True))
    exact = predict(load_policy(tiny_pipeline, FULL), latents)
    rough = predict(policy, latents)
    assert policy.decode(latents).dtype == rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.1 * exact.abs().max()
    with policy.reference():
        assert torch.equal(predict(policy, latents), rough)
    train_a_step(policy, latents)
    assert all(weight.dtype == torch.float32 for weight in policy.parameters())
    assert not torch.equal(predict(policy, latents), rough)


def test_gradient_checkpointing_changes_no_gradient(tiny_pipeline: Path, latents: Tensor) -> None:
    gradients = []
    for checkpointing in (False, True):
        policy = load_policy(tiny_pipeline, PolicySettings(train="full", gradient_checkpointing=checkpointing))
        policy.predict(latents, TIME, policy.encode(TEXTS)).square().mean().backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in policy.parameters() if weight.grad is not None]))
    torch.testing.assert_close(*gradients)


# What is written, diffusers reads


@pytest.mark.parametrize("settings", [FULL, LORA])
def test_saved_pipeline_predicts_the_same(tiny_pipeline: Path, tmp_path: Path, latents: Tensor, settings: PolicySettings) -> None:
    policy, folder = load_policy(tiny_pipeline, settings), tmp_path / "runs" / "saved"
    policy.save_pipeline(folder)
    train_a_step(policy, latents)
    policy.save_pipeline(folder)  # takes the place of the first
    assert [path.name for path in folder.parent.iterdir()] == ["saved"]
    loaded = StableDiffusionPipeline.from_pretrained(folder)
    torch.testing.assert_close(diffusers_predict(loaded, latents), predict(policy, latents), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(predict(load_policy(folder, LORA), latents), predict(policy, latents), atol=1e-4, rtol=1e-4)
    images = loaded(TEXTS, num_inference_steps=2, output_type="pt").images
    assert images.shape == (2, 3, 32, 32)


def test_saved_lora_predicts_the_same(tiny_pipeline: Path, tmp_path: Path, latents: Tensor) -> None:
    policy = load_policy(tiny_pipeline, LORA)
    train_a_step(policy, latents)
    policy.save_lora(tmp_path / "lora")
    loaded = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    loaded.load_lora_weights(tmp_path / "lora")
    torch.testing.assert_close(diffusers_predict(loaded, latents), predict(policy, latents), atol=1e-4, rtol=1e-4)


def test_nothing_of_the_user_is_overwritten(tiny_pipeline: Path, tmp_path: Path) -> None:
    policy = load_policy(tiny_pipeline, LORA)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="is not a saved model"):
        policy.save_pipeline(tmp_path)
    with pytest.raises(UserError, match="holds the base model"):
        policy.save_pipeline(tiny_pipeline)
    with pytest.raises(UserError, match="no LoRA to save"):
        load_policy(tiny_pipeline, FULL).save_lora(tmp_path / "lora")


# Refusals, one sentence each


def refusal(folder: Path, settings: PolicySettings = LORA) -> str:
    with pytest.raises(UserError) as caught:
        load_policy(folder, settings)
    message = str(caught.value)
    assert "\n" not in message and ". " not in message.removesuffix(".")
    return message


def test_folder_that_is_no_pipeline(tmp_path: Path) -> None:
    assert "has no model_index.json" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("file", "changes", "sentence"),
    [
        ("model_index.json", {"_class_name": "FluxPipeline"}, "is a FluxPipeline; supported is StableDiffusionPipeline"),
        ("model_index.json", {"unet": ["diffusers", "UNet1DModel"]}, "has UNet1DModel as unet; supported is UNet2DConditionModel"),
        ("unet/config.json", {"cross_attention_dim": 64}, "mismatched weights, such as down_blocks.1.attentions.0"),
        ("unet/config.json", {"layers_per_block": 2}, "missing weights, such as"),
        ("unet/config.json", {"in_channels": 9}, "mismatched weights, such as conv_in.weight"),
        ("text_encoder/config.json", {"num_hidden_layers": 1}, "unexpected weights, such as encoder.layers.1"),
        ("text_encoder/config.json", {"max_position_embeddings": 8}, "mismatched weights"),
        ("unet/config.json", {"sample_size": None}, "set policy.image_size"),
    ],
)
def test_folder_that_contradicts_itself(tiny_pipeline: Path, tmp_path: Path, file: str, changes: dict[str, Any], sentence: str) -> None:
    assert sentence in refusal(edited(tiny_pipeline, tmp_path / "model", file, **changes))


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


def test_parts_of_different_models(tiny_pipeline: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_pipeline, tmp_path / "model"))
    config = json.loads((tiny_pipeline / "text_encoder" / "config.json").read_text())
    CLIPTextModel(CLIPTextConfig(**config | {"hidden_size": 48})).save_pretrained(folder / "text_encoder")
    assert "expects a condition of width 96, the text encoder gives 48" in refusal(folder)
    CLIPTextModel(CLIPTextConfig(**config | {"vocab_size": 10})).save_pretrained(folder / "text_encoder")
    assert "the text encoder knows 10" in refusal(folder)


def test_settings_that_do_not_fit_the_model(tiny_pipeline: Path) -> None:
    assert "no layer of the UNet is called 'to_qq'" in refusal(tiny_pipeline, PolicySettings(lora_targets=("to_k", "to_qq")))
    assert "['to_q', 'norm1'] are not all linear" in refusal(tiny_pipeline, PolicySettings(lora_targets=("to_q", "norm1")))
    assert "image_size = 33 is not a multiple of 4" in refusal(tiny_pipeline, PolicySettings(image_size=33))
    assert load_policy(tiny_pipeline, PolicySettings(image_size=64)).sample_shape == (4, 16, 16)
