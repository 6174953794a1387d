"""A tiny autoencoder that decodes what the reward sees, learnt from the whole one in a few seconds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny
from torch import Tensor

from safediffusion import post_train
from safediffusion.cost.shapes import measure_shapes
from safediffusion.errors import UserError
from safediffusion.hub import EMBEDDED, resolve_part
from safediffusion.policies.latent import PolicySettings, load_policy
from safediffusion.process import from_scheduler
from safediffusion.rollout import roll_out, sketch_shift
from safediffusion.tiny.pairs import render_pairs
from safediffusion.train.log import read_jsonl
from safediffusion.types import Prompt, Scores

RECIPE = """
model = "pictograms"
steps = 2
[policy]
tiny_vae = "{}"
[process]
steps = 4
guidance = 1.0
[reward]
kind = "callable"
function = "reward_of_red:red"
[algorithm]
kind = "forward"
prompts = 4
group = 4
[data]
safe = "pictograms/train-safe"
unsafe = "pictograms/train-unsafe"
[probe]
every = 0
"""
FILES = ["*.json", "*.safetensors"]
PROMPTS = (Prompt("a red circle"), Prompt("two blue rings"))


class Redness:
    """Red pixels are worth something; a reward that a rough decoder does not disturb much."""

    differentiable = True

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        return Scores((images[:, 0] - images[:, 1:].mean(1)).mean((1, 2)), {})


def student(channels: int = 4) -> AutoencoderTiny:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoencoderTiny(
            latent_channels=channels, encoder_block_out_channels=(8,) * 3, decoder_block_out_channels=(16,) * 3, num_encoder_blocks=(1,) * 3, num_decoder_blocks=(1,) * 3
        )


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    policy, tiny = load_policy(EMBEDDED / "pipeline", PolicySettings()), student()
    pairs = render_pairs(100, seed=1)
    with torch.no_grad():
        latents = policy.encode_images(torch.cat([pairs.safe, pairs.unsafe]))
        wanted = policy.decode(latents) * 2 - 1
    optimizer, generator = torch.optim.Adam(tiny.decoder.parameters(), 4e-3), torch.Generator().manual_seed(0)
    for _ in range(80):
        chosen = torch.randint(len(latents), (16,), generator=generator)
        (tiny.decode(latents[chosen]).sample - wanted[chosen]).abs().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("taught")
    tiny.save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Path]:
    """`recipe(tiny)` is the file of one that rewards red for two iterations."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "reward_of_red.py").write_text("def red(images, prompts):\n    return (images[:, 0] - images[:, 1:].mean(1)).mean((1, 2))\n")

    def write(tiny: Path) -> Path:
        file = tmp_path / "recipe.toml"
        file.write_text(RECIPE.format(tiny))
        return file

    return write


def test_the_reward_sees_the_tiny_one_and_people_the_whole_one(taught: Path) -> None:
    policy, whole = (load_policy(EMBEDDED / "pipeline", PolicySettings(tiny_vae=name)) for name in (str(taught), None))
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    tiny = AutoencoderTiny.from_pretrained(taught)
    with torch.no_grad():
        torch.testing.assert_close(policy.sketch(latents), (tiny.decode(latents).sample / 2 + 0.5).clamp(0, 1))
        assert torch.equal(policy.decode(latents), whole.decode(latents))
        assert torch.equal(whole.sketch(latents), whole.decode(latents))
    process = from_scheduler(policy.scheduler_config, 4)
    rolled = roll_out(policy, process, Redness(), PROMPTS, 2, 1.0, torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(rolled.scores.total, Redness()(policy.sketch(rolled.walk.clean), rolled.prompts).total)


def test_what_it_does_to_the_reward_is_measured(taught: Path) -> None:
    def found(name: str | None, batch: int = 0) -> dict[str, float]:
        policy = load_policy(EMBEDDED / "pipeline", PolicySettings(tiny_vae=name))
        process = from_scheduler(policy.scheduler_config, 4)
        return sketch_shift(policy, process, Redness(), PROMPTS, 8, 1.0, torch.Generator().manual_seed(3), batch)

    assert found(None) == pytest.approx({"shift": 0.0, "spread": 0.0, "agreement": 1.0, "pictures": 16})
    rough = found(str(taught))
    assert 0 < abs(rough["shift"]) < 0.1
    assert 0 < rough["spread"] < 0.1
    assert 0.8 < rough["agreement"] < 1
    assert found(str(taught), batch=5) == pytest.approx(rough, abs=1e-4)


def test_a_run_keeps_what_was_measured(taught: Path, recipe: Callable[[Path], Path], tmp_path: Path) -> None:
    post_train(recipe(taught), tmp_path / "run")
    kept = json.loads((tmp_path / "run" / "tiny_vae.json").read_text())
    assert kept["tiny_vae"] == str(taught)
    assert 0.8 < kept["agreement"] < 1
    assert [record["iteration"] for record in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [1, 2]


def test_one_that_does_not_know_the_latents_is_refused(recipe: Callable[[Path], Path], tmp_path: Path) -> None:
    student().save_pretrained(tmp_path / "untaught")
    with pytest.raises(UserError, match="within a prompt, 0.8 needed; it is not the tiny autoencoder of this model's latents"):
        post_train(recipe(tmp_path / "untaught"), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_one_of_another_shape_is_refused(tmp_path: Path) -> None:
    student(channels=8).save_pretrained(tmp_path / "eight")
    with pytest.raises(UserError, match="decodes 8 channels to 4 pixels per latent cell; the model's latents have 4, and 4 pixels"):
        load_policy(EMBEDDED / "pipeline", PolicySettings(tiny_vae=str(tmp_path / "eight")))


def test_it_is_found_like_a_model(taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="^./nowhere does not exist"):
        resolve_part("./nowhere", FILES)
    with pytest.raises(UserError, match="^org/tiny is not in the local cache and the hub cannot be reached"):
        resolve_part("org/tiny@v1", FILES)
    commit = "0" * 40
    snapshot = Path(shutil.copytree(taught, tmp_path / "models--org--tiny" / "snapshots" / commit))
    assert resolve_part(f"org/tiny@{commit}", FILES) == snapshot


def test_it_is_cheaper_by_count(taught: Path) -> None:
    tiny, whole = (measure_shapes(EMBEDDED / "pipeline", PolicySettings(tiny_vae=name)).decode for name in (str(taught), None))
    assert tiny < whole / 4
