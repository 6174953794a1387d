"""The packaged folders, as diffusers and transformers see them."""

import json
import shutil

import pytest
import torch

from safediffusion import weights
from safediffusion.detectors.objects import ObjectDetector
from safediffusion.encoders.clip import ClipEncoder
from safediffusion.errors import UserError
from safediffusion.hub import verify
from safediffusion.policies.latent import PolicySettings, load_policy
from safediffusion.tiny import package as packaging
from safediffusion.tiny.package import PARTS, package


def test_every_part_is_there_and_sealed(built):
    listed = json.loads((built / "out" / "hashes.json").read_text())
    found = {path.relative_to(built / "out").as_posix() for path in (built / "out").rglob("*") if path.is_file()}
    assert set(listed) == found - {"hashes.json"}
    assert {name.split("/")[0] for name in listed} == set(PARTS)
    for part in PARTS:
        assert verify(built / "out", part).is_dir()


def test_the_pipeline_is_that_of_its_checkpoint_up_to_half_precision(built):
    policy = load_policy(built / "out" / "pipeline", PolicySettings(train="full"))
    average = weights.strip_prefix("average.unet", weights.load(built / "work" / "base_settle.safetensors")[0])
    for name, weight in policy.denoiser.state_dict().items():
        assert weight.dtype == torch.float32 and torch.equal(weight, average[name].half().float())
    average = weights.strip_prefix("average.text", weights.load(built / "work" / "base_settle.safetensors")[0])
    text_encoder = weights.load(built / "out" / "pipeline" / "text_encoder" / "model.safetensors")[0]
    assert all(torch.equal(weight, average[name]) for name, weight in text_encoder.items())


def test_latents_have_unit_scale(built):
    policy = load_policy(built / "out" / "pipeline", PolicySettings(train="full"))
    latents = torch.load(built / "work" / "latents.pt")
    assert (latents * policy.vae.config.scaling_factor).std().item() == pytest.approx(1, abs=1e-5)


def test_the_encoders_see_what_they_were_trained_on(built):
    encoder = ClipEncoder.load(built / "out" / "judge")
    images = torch.rand(2, 3, 32, 32)
    raw = encoder.model.get_image_features((images - 0.5) / 0.5).pooler_output
    assert torch.allclose(encoder.image(images), torch.nn.functional.normalize(raw, dim=1), atol=1e-6)
    assert not torch.equal(encoder.image(images), ClipEncoder.load(built / "out" / "reward").image(images))


def test_the_reward_is_the_one_that_learned_order(built):
    shipped, schooled, unschooled = (
        weights.load(folder / "model.safetensors")[0]["logit_scale"]
        for folder in (built / "out" / "reward", *(built / "work" / "out" / name for name in ("reward_order", "reward")))
    )
    assert torch.equal(shipped, schooled) and not torch.equal(shipped, unschooled)


def test_a_work_folder_is_packaged_as_far_as_it_goes(built, tmp_path):
    shutil.copytree(built / "work" / "out" / "judge", tmp_path / "work" / "out" / "judge")
    shutil.copy(built / "work" / "out" / "detector.safetensors", tmp_path / "work" / "out")
    assert package(tmp_path / "work", tmp_path / "out") == ("detector", "judge")
    assert not (tmp_path / "out" / "pipeline").exists()
    ObjectDetector.load(verify(tmp_path / "out", "detector") / "model.safetensors")


def test_too_large_a_package_is_refused_and_the_old_one_stays(built, tmp_path, monkeypatch):
    shutil.copytree(built / "out", tmp_path / "out")
    monkeypatch.setattr(packaging, "LIMIT", 1000)
    with pytest.raises(UserError, match="at most 1,000"):
        package(built / "work", tmp_path / "out")
    assert verify(tmp_path / "out", "pipeline")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
