"""What shapes say: against known figures of Stable Diffusion, against PyTorch's own count, and against a hand count."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from safediffusion.cost.blueprints import BLUEPRINTS, SD15
from safediffusion.cost.pace import measure_pace
from safediffusion.cost.shapes import counted, measure_shapes
from safediffusion.encoders.clip import ClipEncoder
from safediffusion.errors import UserError
from safediffusion.policies.families import FAMILIES
from safediffusion.policies.latent import PolicySettings, load_policy
from safediffusion.process import from_scheduler


def test_the_denoiser_of_stable_diffusion_15_has_the_known_size_and_cost() -> None:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD15.parts["unet"])
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


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd35-medium", "flux-dev"])
def test_empty_shapes_cost_what_the_real_model_costs(small_shape: Callable[[str], Path], name: str) -> None:
    folder, settings = small_shape(name) / "pipeline", PolicySettings(train="full", image_size=16)
    shapes, policy = measure_shapes(folder, settings), load_policy(folder, settings)
    inputs = torch.zeros(1, *policy.sample_shape), torch.tensor(500.0), policy.encode(["a cat"])
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # whose products PyTorch's counter knows on a CPU too
        with FlopCounterMode(display=False) as counter:
            policy.predict(*inputs)
        assert shapes.forward == counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            policy.decode(inputs[0])
        assert shapes.decode == counter.get_total_flops()
    assert shapes.trained == shapes.parameters == sum(weight.numel() for weight in policy.parameters())
    encoders = [weight for encoder in policy.encode.text.encoders.values() for weight in encoder.parameters()]
    held = [*policy.denoiser.parameters(), *policy.denoiser.buffers(), *policy.vae.parameters(), *encoders]
    assert shapes.weights + shapes.text == sum(weight.nbytes for weight in held)


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
    assert large.painting > 3.5 * plain.painting


@pytest.mark.parametrize("tile", [None, 64])
def test_the_graph_of_a_picture_is_what_decoding_keeps(tiny_pipeline: Path, tile: int | None) -> None:
    settings = PolicySettings(image_size=128, vae_tile=tile)
    policy, process = (made := load_policy(tiny_pipeline, settings)), from_scheduler(made.scheduler_config, 2)
    found = measure_pace(policy, process, 1, through_decoder=True).painting
    assert measure_shapes(tiny_pipeline, settings).painting == pytest.approx(found, rel=0.1)


def test_counting_draws_no_random_number(tiny_pipeline: Path) -> None:
    before = torch.get_rng_state()
    measure_shapes(tiny_pipeline, PolicySettings())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["sdxl", "sd35-medium"])
def test_the_folder_of_a_shaped_model_trains(small_shape: Callable[[str], Path], name: str) -> None:
    policy = load_policy(small_shape(name) / "pipeline", PolicySettings(lora_rank=2, image_size=16))
    policy.predict(torch.ones(1, *policy.sample_shape), torch.tensor(500.0), policy.encode(["a cat"])).square().mean().backward()
    assert any(weight.grad is not None and weight.grad.any() for weight in policy.parameters())
    assert ClipEncoder.load(small_shape(name) / "reward").text(["a cat"]).shape == (1, 16)


@pytest.mark.parametrize(
    ("name", "kind", "parameters"),
    [
        ("sd21", "UNet2DConditionModel", 865_910_724),
        ("sdxl", "UNet2DConditionModel", 2_567_463_684),
        ("sd35-medium", "SD3Transformer2DModel", 2_243_171_520),
        ("flux-dev", "FluxTransformer2DModel", 11_901_408_320),
    ],
)
def test_blueprints_have_the_published_sizes(name: str, kind: str, parameters: int) -> None:
    blueprint = BLUEPRINTS[name]
    with torch.device("meta"):
        network = getattr(diffusers, kind)(**blueprint.parts[FAMILIES[blueprint.pipeline].network])
    assert sum(weight.numel() for weight in network.parameters()) == parameters


def test_another_pipeline_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "SanaPipeline"}')
    with pytest.raises(UserError, match="SanaPipeline"):
        measure_shapes(tmp_path, PolicySettings())
