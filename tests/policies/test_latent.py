"""Our Stable Diffusion policy against diffusers' own pipeline on the same folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from safediffusion.errors import UserError
from safediffusion.policies.latent import LatentPolicy, PolicySettings, load_policy

FULL, LORA = PolicySettings(train="full"), PolicySettings(train="lora", lora_rank=4, lora_alpha=8.0)
Step = Callable[[LatentPolicy, Tensor], None]
TEXTS = ["a red cat", "a blue dog in a kitchen"]
TIME = torch.tensor([981, 20])


@pytest.fixture(scope="module")
def pipeline(tiny_pipeline: Path) -> Any:
    return StableDiffusionPipeline.from_pretrained(tiny_pipeline, safety_checker=None)


@pytest.fixture(scope="module")
def latents() -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def predict(policy: LatentPolicy, latents: Tensor, guidance: float | Tensor = 1.0) -> Tensor:
    with torch.no_grad():
        return policy.predict(latents, TIME, policy.encode(TEXTS), guidance)


def diffusers_predict(pipeline: Any, latents: Tensor) -> Tensor:
    condition = pipeline.encode_prompt(TEXTS, "cpu", 1, False)[0]
    with torch.no_grad():
        return pipeline.unet(latents, TIME, encoder_hidden_states=condition).sample


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


def test_every_image_may_have_a_guidance_of_its_own(tiny_pipeline: Path, latents: Tensor) -> None:
    policy = load_policy(tiny_pipeline, LORA)
    mixed = predict(policy, latents, torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(mixed[0], predict(policy, latents, 1.0)[0])
    torch.testing.assert_close(mixed[1], predict(policy, latents, 3.0)[1])
    widths = []
    policy.network.register_forward_hook(lambda module, inputs, output: widths.append(len(inputs[0])))
    for guidance in (torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]), 3.0, 1.0):
        predict(policy, latents, guidance)
    assert widths == [3, 2, 4, 2]  # who is not guided has no unconditional branch


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
    assert latents.grad is not None
    assert latents.grad.abs().sum() > 0


def test_images_are_encoded_into_the_scale_of_the_unet(tiny_pipeline: Path, pipeline: Any) -> None:
    policy, images = load_policy(tiny_pipeline, LORA), torch.rand(2, 3, 32, 32)
    expected = pipeline.vae.encode(pipeline.image_processor.preprocess(images)).latent_dist.mode() * pipeline.vae.config.scaling_factor
    assert policy.sample_shape == (4, 8, 8)
    torch.testing.assert_close(policy.encode_images(images), expected)


def test_shift_of_the_autoencoder_is_undone(tiny_pipeline: Path, edited: Callable[..., Path]) -> None:
    images = torch.rand(1, 3, 32, 32)
    plain = load_policy(tiny_pipeline, LORA)
    shifted = load_policy(edited("vae/config.json", shift_factor=0.5), LORA)
    torch.testing.assert_close(shifted.encode_images(images), plain.encode_images(images) - 0.5 * plain.vae.config.scaling_factor)
    torch.testing.assert_close(shifted.decode(shifted.encode_images(images)), plain.decode(plain.encode_images(images)))


def test_v_prediction_folder(tiny_pipeline: Path, edited: Callable[..., Path], latents: Tensor) -> None:
    folder = edited("scheduler/scheduler_config.json", prediction_type="v_prediction")
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


def test_condition_made_in_inference_mode_can_be_trained_with(tiny_pipeline: Path, latents: Tensor, train_a_step: Step) -> None:
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
def test_reference_stays_the_base_model(tiny_pipeline: Path, latents: Tensor, settings: PolicySettings, train_a_step: Step) -> None:
    policy = load_policy(tiny_pipeline, settings)
    before = predict(policy, latents)
    train_a_step(policy, latents)
    after = predict(policy, latents)
    assert (after - before).abs().max() > 1e-3
    for _ in range(2):
        with policy.reference(), policy.reference():
            reference = policy.predict(latents, TIME, policy.encode(TEXTS))
        assert torch.equal(reference, before)
        assert not reference.requires_grad
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
def test_state_brings_back_the_trained_model_and_not_its_reference(tiny_pipeline: Path, latents: Tensor, settings: PolicySettings, train_a_step: Step) -> None:
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
            return policy.denoiser(*arguments, **options)

    policy.network = Wrapped()
    predict(policy, latents, guidance=2.0)
    with policy.reference():
        predict(policy, latents)
    assert calls == [4]
    assert isinstance(policy.network, Wrapped)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_only_painted_with_gives_the_same_bits_and_is_rounded(tiny_pipeline: Path, latents: Tensor, tmp_path: Path, dtype: Any) -> None:
    painting, training = (load_policy(tiny_pipeline, PolicySettings(train=train, dtype=dtype)) for train in ("none", "full"))
    assert torch.equal(painting.encode(TEXTS), training.encode(TEXTS))
    with torch.no_grad():
        one, other = (policy.predict(latents, TIME, policy.encode(TEXTS), 3.0) for policy in (painting, training))
    assert torch.equal(one, other)
    assert torch.equal(painting.decode(latents), training.decode(latents))
    assert painting.parameters() == []
    layers = [layer for layer in painting.denoiser.modules() if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d))]
    assert {weight.dtype for layer in layers for weight in layer.parameters()} == {getattr(torch, dtype)}
    with pytest.raises(UserError, match="is only painted with"):
        painting.save_pipeline(tmp_path / "saved")


# What is written, diffusers reads


@pytest.mark.parametrize("settings", [FULL, LORA])
def test_saved_pipeline_predicts_the_same(tiny_pipeline: Path, tmp_path: Path, latents: Tensor, settings: PolicySettings, train_a_step: Step) -> None:
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


def test_safety_checker_that_was_not_downloaded_is_not_asked_for(edited: Callable[..., Path], tmp_path: Path) -> None:
    parts = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "feature_extractor": ["transformers", "CLIPImageProcessor"]}
    folder = edited("model_index.json", requires_safety_checker=True, **parts)
    load_policy(folder, LORA).save_pipeline(tmp_path / "saved")
    assert StableDiffusionPipeline.from_pretrained(tmp_path / "saved").safety_checker is None


def test_saved_lora_predicts_the_same(tiny_pipeline: Path, tmp_path: Path, latents: Tensor, train_a_step: Step) -> None:
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
