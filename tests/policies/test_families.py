"""What every family of models must do, against diffusers' own pipelines on the same folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from safediffusion.cli.app import main
from safediffusion.evaluate import run as evaluation
from safediffusion.evaluate.painter import Painter
from safediffusion.evaluate.rows import Row, Rows
from safediffusion.evaluate.task import Painting, Score, Sets, Task
from safediffusion.files import read_jsonl
from safediffusion.policies.families import find_family
from safediffusion.policies.latent import LatentPolicy, PolicySettings, load_policy
from safediffusion.policies.variant import variant
from safediffusion.process import from_scheduler
from safediffusion.rollout import walk
from safediffusion.types import Prompt

NAMES = ["sd21", "sdxl", "sdxl-v", "sd3", "sd3-no-t5", "flux-dev", "flux-schnell"]
Step = Callable[[LatentPolicy, Tensor], None]
TEXTS = ["a red cat", "a blue dog in a kitchen"]
TIME = torch.tensor([977.5, 20.25])
LORA, FULL = PolicySettings(lora_rank=4, lora_alpha=8.0, image_size=32), PolicySettings(train="full", image_size=32)


@dataclass(frozen=True)
class Oracle:
    """A folder, and what diffusers makes of it."""

    name: str
    folder: Path

    @property
    def flux(self) -> bool:
        return self.name.startswith("flux")

    @property
    def flow(self) -> bool:
        return self.flux or self.name.startswith("sd3")

    def load(self, folder: Path | None = None) -> Any:
        from diffusers import DiffusionPipeline

        missing = {"text_encoder_3": None, "tokenizer_3": None} if self.name == "sd3-no-t5" else {}
        pipeline = DiffusionPipeline.from_pretrained(folder or self.folder, **missing)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def paint(self, pipeline: Any, latents: Tensor, steps: int, guidance: float, output: str = "latent") -> Any:
        """Clean latents, or pictures, of TEXTS from these initial latents."""
        height, width = (pipeline.vae_scale_factor * side for side in latents.shape[-2:])
        options = {"guidance_scale": guidance}
        if self.name in ("sd3", "flux-dev", "flux-schnell"):
            options["max_sequence_length"] = 16
        if self.flux:
            latents = pipeline._pack_latents(latents, *latents.shape)
            options |= {"true_cfg_scale": guidance, "negative_prompt": [""] * len(TEXTS), "guidance_scale": 3.5}
        images = pipeline(TEXTS, latents=latents, num_inference_steps=steps, height=height, width=width, output_type=output, **options).images
        return pipeline._unpack_latents(images, height, width, pipeline.vae_scale_factor) if self.flux and output == "latent" else images

    def apart(self, one: Tensor, other: Tensor) -> float:
        """The largest difference; of UNets as a share of the largest number, since latents of an untrained one reach 10."""
        return ((one - other).abs().max() / (1.0 if self.flow else other.abs().max())).item()


@pytest.fixture(scope="module", params=NAMES)
def oracle(request: pytest.FixtureRequest, folder_of: Callable[[str], Path]) -> Oracle:
    return Oracle(request.param, folder_of(request.param))


@pytest.fixture(scope="module")
def latents(oracle: Oracle) -> Tensor:
    return noise(oracle, 8)


def noise(oracle: Oracle, side: int) -> Tensor:
    return torch.randn(2, 8 if oracle.flow else 4, side, side, generator=torch.Generator().manual_seed(1))


def predict(policy: LatentPolicy, latents: Tensor, guidance: float = 1.0) -> Tensor:
    with torch.no_grad():
        return policy.predict(latents, TIME, policy.encode(TEXTS), guidance)


def painted(policy: LatentPolicy, latents: Tensor, steps: int, guidance: float) -> Tensor:
    process = from_scheduler(policy.scheduler_config, steps, eta=0.0, tokens=policy.tokens())
    return walk(policy, process, policy.encode(TEXTS), latents, guidance).clean


def test_deterministic_sampler_is_that_of_the_pipeline(oracle: Oracle, latents: Tensor) -> None:
    policy, pipeline = load_policy(oracle.folder, LORA), oracle.load()
    for guidance in (1.0, 4.0):
        clean = painted(policy, latents, 5, guidance)
        assert oracle.apart(clean, oracle.paint(pipeline, latents, 5, guidance)) < 1e-5
        assert (clean - latents).abs().max() > 0.5
    with torch.no_grad():
        assert oracle.apart(policy.decode(clean), oracle.paint(pipeline, latents, 5, 4.0, "pt")) < 1e-5


def test_deterministic_sampler_is_that_of_the_pipeline_at_another_size(oracle: Oracle) -> None:
    policy, large = load_policy(oracle.folder, PolicySettings(image_size=48)), noise(oracle, 12)
    assert policy.sample_shape == large.shape[1:]
    assert oracle.apart(painted(policy, large, 3, 4.0), oracle.paint(oracle.load(), large, 3, 4.0)) < 1e-5


def test_every_projection_of_attention_is_adapted(oracle: Oracle) -> None:
    policy = load_policy(oracle.folder, LORA)
    adapted = {name.rpartition(".lora_A")[0] for name in policy.trained if "lora_A" in name}
    attention = {
        name for name, layer in policy.denoiser.named_modules() if "attn" in name and isinstance(layer, torch.nn.Linear) and "lora" not in name and "norm" not in name
    }
    assert adapted == {name.removesuffix(".base_layer") for name in attention}
    assert any(("add_q_proj" if oracle.flow else "attn2.to_k") in name for name in adapted)  # one that reads the text


@pytest.mark.parametrize("settings", [FULL, LORA], ids=["full", "lora"])
def test_saved_models_paint_the_same_in_diffusers(oracle: Oracle, settings: PolicySettings, latents: Tensor, tmp_path: Path, train_a_step: Step) -> None:
    policy = load_policy(oracle.folder, settings)
    before = predict(policy, latents)
    train_a_step(policy, latents)
    assert oracle.apart(predict(policy, latents), before) > 1e-3
    with policy.reference():
        assert torch.equal(predict(policy, latents), before)
    ours = painted(policy, latents, 3, 4.0)
    policy.save_pipeline(tmp_path / "saved")
    assert oracle.apart(oracle.paint(oracle.load(tmp_path / "saved"), latents, 3, 4.0), ours) < 1e-4
    if settings.train == "lora":
        policy.save_lora(tmp_path / "lora")
        pipeline = oracle.load()
        pipeline.load_lora_weights(tmp_path / "lora")
        assert oracle.apart(oracle.paint(pipeline, latents, 3, 4.0), ours) < 1e-4
        again = variant(f"{oracle.folder}+{tmp_path / 'lora'}", Path).load()
        assert oracle.apart(predict(again, latents), predict(policy, latents)) < 1e-4


SLOW_NORMS = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch, of FLUX's norms: trained, so in float32


@pytest.mark.parametrize("settings", [pytest.param(FULL, marks=SLOW_NORMS), LORA], ids=["full", "lora"])
def test_bfloat16_computes_in_bfloat16_and_trains_in_float32(oracle: Oracle, settings: PolicySettings, latents: Tensor, train_a_step: Step) -> None:
    exact = predict(load_policy(oracle.folder, settings), latents)
    policy = load_policy(oracle.folder, replace(settings, dtype="bfloat16", vae_dtype="bfloat16", gradient_checkpointing=True))
    rough = predict(policy, latents)
    assert policy.decode(latents).dtype == rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.1 * exact.abs().max()
    for _ in range(2):
        with policy.reference():
            assert torch.equal(predict(policy, latents), rough)
        train_a_step(policy, latents)
        assert not torch.equal(predict(policy, latents), rough)
    assert all(weight.dtype == torch.float32 for weight in policy.parameters())


def test_what_is_only_painted_with_is_the_same_in_float32_and_small_in_bfloat16(oracle: Oracle, latents: Tensor) -> None:
    painting, training = (load_policy(oracle.folder, replace(FULL, train=train)) for train in ("none", "full"))
    assert torch.equal(predict(painting, latents), predict(training, latents))
    half = load_policy(oracle.folder, replace(FULL, train="none", dtype="bfloat16"))
    assert half.parameters() == []
    assert {weight.dtype for layer in half.denoiser.modules() if isinstance(layer, torch.nn.Linear) for weight in layer.parameters()} == {torch.bfloat16}
    assert 0 < (predict(half, latents) - predict(painting, latents)).abs().max() < 0.1 * predict(painting, latents).abs().max()


def test_pictures_are_painted_with_the_guidance_of_the_family(oracle: Oracle, tmp_path: Path) -> None:
    asked = ["generate", str(oracle.folder), "--prompt", TEXTS[0], "--steps", "2", "--size", "32", "--out", str(tmp_path)]
    assert main(asked) == 0
    usual = 1.0 if oracle.flux else 5.0
    assert main([*asked, "--guidance", str(usual)]) == 0
    assert [row["guidance"] for row in read_jsonl(tmp_path / "manifest.jsonl")] == [usual]


def test_an_evaluation_warns_once_of_guidance_that_a_family_does_without(oracle: Oracle, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    rows = Rows(tuple(Row(str(number), Prompt(text)) for number, text in enumerate(TEXTS)), 0, "")
    bright = {"bright": Score(instrument="none", label="bright")}
    planned = []
    for name, strength in (("one", 3.0), ("two", 2.0), ("free", 1.0)):
        painting = Painting(steps=1, size=32, guidance=strength)
        planned.append(evaluation.Plan(Task(name=name, version=1, title="", prompts=Sets(sets={"safe": "s"}), painting=painting, measures=bright), rows))
    for plans, count in ((planned[2:], 0), (planned, 1)):
        evaluation.painted(Painter(variant(str(oracle.folder), Path)), plans, tmp_path, torch.device("cpu"), 0, lambda done: None)
        said = [str(each.message) for each in recwarn if "does without classifier-free guidance" in str(each.message)]
        assert len(said) == count * oracle.flux
    assert all("asks for a strength of 3:" in each for each in said)


def test_gradient_checkpointing_changes_no_gradient(oracle: Oracle, latents: Tensor) -> None:
    gradients = []
    for checkpointing in (False, True):
        policy = load_policy(oracle.folder, replace(FULL, gradient_checkpointing=checkpointing))
        policy.predict(latents, TIME, policy.encode(TEXTS)).square().mean().backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in policy.parameters() if weight.grad is not None]))
    torch.testing.assert_close(*gradients)


RECIPE = """
model = "{model}"
steps = 1
[policy]
image_size = 32
lora_rank = 2
[process]
steps = 3
guidance = 2.0
eta = {eta}
[reward]
kind = "similarity"
encoder = "pictograms"
[algorithm]
{algorithm}
prompts = 2
group = 2
[data]
safe = "{prompts}"
unsafe = ""
[probe]
every = 0
[log]
checkpoint_every = 1
"""
ALGORITHMS = {"grpo": ('kind = "grpo"\nwindow.length = 1', 1.0), "forward": ('kind = "forward"\ntimes = 2', 0.0)}  # with their eta


@pytest.mark.parametrize("kind", ALGORITHMS)
def test_the_ordinary_command_trains_it(oracle: Oracle, kind: str, tmp_path: Path) -> None:
    recipe, prompts, run = tmp_path / "recipe.toml", tmp_path / "prompts.txt", tmp_path / "run"
    prompts.write_text("\n".join(TEXTS))
    algorithm, eta = ALGORITHMS[kind]
    recipe.write_text(RECIPE.format(model=oracle.folder, prompts=prompts, algorithm=algorithm, eta=eta))
    assert main(["train", str(recipe), "--out", str(run)]) == 0
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["grad_norm"] > 0
    base, trained = (getattr(oracle.load(each), find_family(each).network).state_dict() for each in (oracle.folder, run / "model"))
    assert any(not torch.equal(base[name], trained[name]) for name in base)
