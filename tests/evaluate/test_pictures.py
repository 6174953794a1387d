"""What is painted: a row's own seed, guidance and size reach the sampler, as they would a diffusers pipeline."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from safediffusion.errors import UserError
from safediffusion.evaluate.pictures import native_side, paint, pictures_of
from safediffusion.evaluate.rows import Row
from safediffusion.evaluate.task import Painting
from safediffusion.hub import EMBEDDED
from safediffusion.policies.variant import Variant
from safediffusion.types import Prompt

PIPELINE = EMBEDDED / "pipeline"
ROW = Row("0", Prompt("a red circle left of a blue star"), seed=7, guidance=2.5, width=48, height=32)


@pytest.fixture(scope="module")
def policy():
    return Variant(PIPELINE).load("cpu")


def painted(policy, pictures, batch: int = 0) -> torch.Tensor:
    return torch.cat([images for _, images in paint(policy, pictures, batch)])


def test_a_picture_is_that_of_a_diffusers_pipeline(policy) -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pictures = pictures_of(ROW, Painting(samples=3, steps=6, guidance="row", size="row", seed="row"), 32)
    pipeline = StableDiffusionPipeline.from_pretrained(PIPELINE)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    wanted = pipeline(
        ROW.prompt.text,
        num_inference_steps=6,
        guidance_scale=2.5,
        width=48,
        height=32,
        num_images_per_prompt=3,
        generator=torch.Generator().manual_seed(7),
        output_type="pt",
    ).images
    ours = painted(policy, pictures)
    assert ours.shape == (3, 3, 32, 48)
    assert torch.allclose(ours, wanted, atol=2e-3)


def test_a_picture_does_not_depend_on_its_batch(policy) -> None:
    pictures = pictures_of(ROW, Painting(samples=4, steps=3), 32)
    assert torch.allclose(painted(policy, pictures, 1), painted(policy, pictures), atol=1e-5)


def test_sizes_are_painted_each_in_its_own(policy) -> None:
    wide, small = (Row("0", Prompt("a star"), width=side, height=32) for side in (64, 32))
    pictures = [*pictures_of(wide, Painting(steps=2, size="row"), 32), *pictures_of(small, Painting(steps=2, size="row"), 32)]
    assert [tuple(images.shape) for _, images in paint(policy, pictures, 0)] == [(1, 3, 32, 64), (1, 3, 32, 32)]
    with pytest.raises(UserError, match="side of 33 pixels is not a multiple of 4"):
        list(paint(policy, pictures_of(Row("0", Prompt("a star"), width=33, height=32), Painting(steps=2, size="row"), 32), 0))


def test_each_size_is_painted_with_its_own_shift_of_a_flow(policy) -> None:
    """One after the other as alone; the shift of the first would be another picture."""
    shifted = {"use_dynamic_shifting": True, "base_image_seq_len": 16, "max_image_seq_len": 256}
    flow = dataclasses.replace(policy, scheduler_config={"_class_name": "FlowMatchEulerDiscreteScheduler", **shifted})
    wide, small = (pictures_of(Row("0", Prompt("a star"), width=side, height=32), Painting(steps=3, size="row"), 32) for side in (128, 32))
    _, together = (images for _, images in paint(flow, [*wide, *small], 0))
    assert torch.equal(together, painted(flow, small))
    flow.scheduler_config["base_image_seq_len"] = 64
    assert not torch.allclose(together, painted(flow, small), atol=1e-2)


def test_a_row_that_lacks_what_the_task_takes_from_it_is_refused() -> None:
    with pytest.raises(UserError, match="gives no guidance"):
        pictures_of(Row("0", Prompt("a star")), Painting(guidance="row"), 32)


def test_the_native_size_is_read_from_the_configuration(tmp_path: Path) -> None:
    assert native_side(PIPELINE) == 32
    with pytest.raises(UserError, match="has no model_index.json"):
        native_side(tmp_path)
