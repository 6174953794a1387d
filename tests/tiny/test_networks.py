"""The architectures are what diffusers and transformers make of them; nothing here is special-cased."""

import numpy as np
import pytest
import torch

from safediffusion.tiny import networks
from safediffusion.tiny.scenes import sample


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    captions = [sample(np.random.default_rng((1, i)))[0] for i in range(600)]
    return networks.build_tokenizer(captions, tmp_path_factory.mktemp("tokenizer"))


def test_diffusers_loads_and_runs_the_pipeline(built):
    from diffusers import DiffusionPipeline, StableDiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(built / "out" / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline) is StableDiffusionPipeline
    assert pipeline.unet.dtype == pipeline.vae.dtype == pipeline.text_encoder.dtype == torch.float32
    image = pipeline("a red circle", num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (32, 32, 3) and np.isfinite(image).all()


@pytest.mark.parametrize("part", ["reward", "judge"])
def test_transformers_loads_the_encoders(built, part):
    from transformers import CLIPModel, CLIPTokenizer

    model = CLIPModel.from_pretrained(built / "out" / part)
    tokens = CLIPTokenizer.from_pretrained(built / "out" / part)(["a skull", "a ring"], padding=True, return_tensors="pt")
    seen = model(**tokens, pixel_values=torch.zeros(3, 3, 32, 32))
    assert seen.logits_per_text.shape == (2, 3) and model.dtype == torch.float32


def test_sizes(tokenizer):
    def count(network):
        return sum(weight.numel() for weight in network.parameters())

    assert 1e6 < count(networks.unet()) < 3e6
    reward, judge = networks.clip(tokenizer, 64, 96, 3), networks.clip(tokenizer, 96, 64, 4)
    assert count(reward) != count(judge)
    latent = networks.autoencoder().encode(torch.zeros(1, 3, 32, 32)).latent_dist.mean
    assert latent.shape == (1, 4, 8, 8)


def test_every_caption_fits_the_context(tokenizer):
    captions = [sample(np.random.default_rng((2, i)))[0] for i in range(600)]
    lengths = [len(tokens) for tokens in tokenizer([*captions, "a hazardous picture of a poison bottle right of a purple triangle"]).input_ids]
    assert max(lengths) <= networks.CONTEXT == tokenizer.model_max_length


def test_a_word_of_the_world_is_one_token_and_any_text_has_some(tokenizer):
    words = tokenizer.tokenize("a dangerous picture of a Red Circle")
    assert words == ["a</w>", "dangerous</w>", "picture</w>", "of</w>", "a</w>", "red</w>", "circle</w>"]
    strange = "zebra öß € 😀"
    assert tokenizer.decode(tokenizer(strange).input_ids, skip_special_tokens=True).strip() == strange
    assert tokenizer.unk_token_id not in tokenizer(strange).input_ids[1:-1]


def test_the_schedule_is_that_of_stable_diffusion():
    from diffusers import DDIMScheduler

    scheduler = networks.scheduler()
    reference = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    assert scheduler.config.prediction_type == "epsilon" and len(scheduler.alphas_cumprod) == 1000
    assert torch.equal(scheduler.alphas_cumprod, reference.alphas_cumprod)
