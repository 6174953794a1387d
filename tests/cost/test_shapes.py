"""What shapes say: against known figures of Stable Diffusion, against PyTorch's own count, and against a hand count."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from safediffusion.bench.shaped import SD15, write_shaped
from safediffusion.cost.shapes import counted, measure_shapes
from safediffusion.errors import UserError
from safediffusion.policies.latent import PolicySettings, load_policy


def test_the_denoiser_of_stable_diffusion_15_has_the_known_size_and_cost() -> None:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD15.unet)
        inputs = torch.zeros(1, 4, 64, 64), torch.zeros(1, dtype=torch.long), torch.zeros(1, 77, 768)
    assert sum(weight.numel() for weight in unet.parameters()) == 859_520_964
    # Multiplications and additions apart: 0.402 T multiply-adds, which others call 0.402 or 0.803 TFLOP.
    with torch.no_grad():
        assert counted(lambda: unet(*inputs)) == pytest.approx(0.803e12, rel=1e-3)


def test_a_convolution_and_a_product_by_hand() -> None:
    convolution, product = torch.nn.Conv2d(3, 8, 3, padding=1, bias=False), torch.nn.Linear(5, 7, bias=False)
    with torch.no_grad():
        assert counted(lambda: convolution(torch.zeros(2, 3, 10, 10))) == 2 * (2 * 10 * 10 * 8) * 3 * 9
        assert counted(lambda: product(torch.zeros(4, 5))) == 2 * 4 * 5 * 7


def test_attention_of_the_cpu_is_counted() -> None:
    query = torch.zeros(1, 2, 6, 8)
    assert counted(lambda: torch.nn.functional.scaled_dot_product_attention(query, query, query)) == 2 * (2 * 6 * 6 * 8) * 2


def test_empty_shapes_cost_what_the_real_model_costs(tiny_pipeline: Path) -> None:
    shapes = measure_shapes(tiny_pipeline, PolicySettings(train="full"))
    policy = load_policy(tiny_pipeline, PolicySettings(train="full"))
    policy.unet.set_attn_processor(_plain_attention())  # whose products PyTorch's counter knows on a CPU too
    inputs = torch.zeros(1, *policy.sample_shape), torch.tensor(500), policy.encode(["a cat"])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        policy.predict(*inputs)
    assert shapes.forward == counter.get_total_flops()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        policy.decode(inputs[0])
    assert shapes.decode == counter.get_total_flops()
    assert shapes.trained == shapes.parameters == sum(weight.numel() for weight in policy.parameters())
    held = [*policy.unet.parameters(), *policy.vae.parameters(), *policy.encode.text_encoder.parameters()]
    assert shapes.weights == sum(weight.nbytes for weight in held)


def test_adapters_are_cheaper_to_train(tiny_pipeline: Path) -> None:
    full, lora = (measure_shapes(tiny_pipeline, PolicySettings(train=train)) for train in ("full", "lora"))
    assert lora.trained < full.trained / 10
    assert full.backward == pytest.approx(2 * full.forward, rel=0.05)
    assert lora.backward < 1.2 * lora.forward
    assert full.parameters == lora.parameters


def test_half_precision_keeps_less_and_a_larger_picture_costs_more(tiny_pipeline: Path) -> None:
    plain = measure_shapes(tiny_pipeline, PolicySettings())
    half = measure_shapes(tiny_pipeline, PolicySettings(dtype="bfloat16"))
    large = measure_shapes(tiny_pipeline, PolicySettings(image_size=64))
    assert half.activations < 0.8 * plain.activations
    assert half.weights < plain.weights
    assert large.forward > 3.5 * plain.forward
    assert large.decoding == 4 * plain.decoding


def test_counting_draws_no_random_number(tiny_pipeline: Path) -> None:
    before = torch.get_rng_state()
    measure_shapes(tiny_pipeline, PolicySettings())
    assert torch.equal(torch.get_rng_state(), before)


def test_the_folder_of_a_shaped_model_trains(tmp_path: Path, small_shape) -> None:
    folder = write_shaped(tmp_path / "small", small_shape)
    shapes = measure_shapes(folder / "pipeline", PolicySettings(train="full"))
    policy = load_policy(folder / "pipeline", PolicySettings(train="full"))
    assert shapes.parameters == sum(weight.numel() for weight in policy.parameters())
    assert policy.encode(["a cat"]).shape[1] == 77


def test_another_pipeline_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(UserError, match="FluxPipeline"):
        measure_shapes(tmp_path, PolicySettings())


def _plain_attention():
    from diffusers.models.attention_processor import AttnProcessor

    return AttnProcessor()
