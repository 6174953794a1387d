"""`safediffusion export`, `report`: what leaves a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from safediffusion.train.checkpoint import best_path, latest_progress
from safediffusion.weights import load


def unet(folder: Path) -> dict[str, torch.Tensor]:
    return load(folder / "unet" / "diffusion_pytorch_model.safetensors")[0]


def test_the_exported_model_is_that_of_the_run_with_a_card(command, run: Path, tmp_path: Path) -> None:
    command("evaluate", run, "--against", "pictograms", "--limit", 2, "--samples", 2, "--out", run)
    assert command("export", run, "--to", tmp_path / "safer").code == 0
    one, other = unet(run / "model"), unet(tmp_path / "safer")
    assert all(torch.equal(one[name], other[name]) for name in one)
    card = (tmp_path / "safer" / "README.md").read_text()
    assert 'license: "apache-2.0"' in card
    assert "| metric | base | trained | change | n |" in card
    assert command("export", run, "--to", tmp_path / "safer").code == 0  # again, over itself


def test_a_card_has_no_numbers_of_other_weights(command, run: Path, tmp_path: Path) -> None:
    ended = command("export", run, "--checkpoint", "last", "--to", tmp_path / "last")
    assert "the last checkpoint (iteration 2)" in ended.out
    assert "no numbers" in ended.out
    assert "were not measured" in (tmp_path / "last" / "README.md").read_text()


def test_lora_is_loaded_by_diffusers(command, recipe: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    from safediffusion.hub import EMBEDDED

    run = tmp_path / "run"
    assert command("train", recipe, "policy.train=lora", "optimizer.lr=0.01", "--out", run).code == 0
    assert command("export", run, "--lora", "--checkpoint", "last", "--to", tmp_path / "lora").code == 0
    assert command("export", run, "--checkpoint", "last", "--to", tmp_path / "whole").code == 0
    command("export", run, "--lora", "--dtype", "bfloat16", "--to", tmp_path / "lora").refused("--dtype is of a whole model")
    assert command("export", run, "--checkpoint", "last", "--dtype", "bfloat16", "--to", tmp_path / "half").code == 0
    assert {weight.dtype for weight in unet(tmp_path / "half").values()} == {torch.bfloat16}
    pipeline = StableDiffusionPipeline.from_pretrained(EMBEDDED / "pipeline")
    pipeline.load_lora_weights(tmp_path / "lora")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    fused, whole = pipeline.unet.state_dict(), unet(tmp_path / "whole")
    assert all(torch.allclose(fused[name].float(), whole[name].float(), atol=1e-3) for name in whole)
    assert any(not torch.equal(fused[name].float(), unet(EMBEDDED / "pipeline")[name].float()) for name in whole)


def test_the_averaged_weights_are_exported(command, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command("train", recipe, "optimizer.ema=0.9", "optimizer.lr=0.01", "probe.every=0", "--out", run)
    checkpoint = load(run / "checkpoints" / "step-000002.safetensors")[0]
    exported = unet(run / "model")
    name = "conv_in.weight"
    averages = [checkpoint[key] for key in checkpoint if key.startswith("average.")]
    assert any(each.shape == exported[name].shape and torch.equal(each.to(exported[name]), exported[name]) for each in averages)
    assert not torch.equal(checkpoint[f"policy.{name}"], exported[name])


def test_what_cannot_be_exported(command, run: Path, recipe: Path, tmp_path: Path) -> None:
    command("export", tmp_path / "none", "--to", tmp_path / "out").refused("is not the folder of a run")
    command("export", run, "--lora", "--to", tmp_path / "out").refused('policy.train = "full" has no LoRA')
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    command("export", run, "--to", tmp_path / "mine").refused("exists and is not a saved model")
    best = best_path(run, latest_progress(run / "checkpoints").best["iteration"])
    best.write_bytes(b"x")
    command("export", run, "--checkpoint", "best", "--to", tmp_path / "out").refused("cannot be read", "--checkpoint last")
    ended = command("export", run, "--to", tmp_path / "out")
    assert ended.code == 0
    assert "the last checkpoint is taken instead" in ended.err
    best.unlink()
    command("export", run, "--checkpoint", "best", "--to", tmp_path / "out").refused("has no best checkpoint")


def test_a_report_of_a_run(command, run: Path, tmp_path: Path) -> None:
    command("evaluate", run, "--against", "pictograms", "--limit", 2, "--samples", 2, "--out", run)
    ended = command("report", run)
    assert ended.out.strip() == str(run / "report" / "index.html")
    page = (run / "report" / "index.html").read_text()
    assert "<svg" in page
    shown = json.loads((run / "gallery" / "gallery.json").read_text())["rows"]
    assert page.count("data:image/png") == sum(model in row for row in shown for model in ("base", "trained")) >= 16
    assert command("report", run, run, "--out", tmp_path / "both").code == 0


@pytest.mark.parametrize("text", [None, "{", "[]", '{"schema": 9}', '{"schema": 1}'])
def test_what_cannot_be_reported(command, tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "results.json").write_text(text)
    command("report", tmp_path).refused("results.json")
