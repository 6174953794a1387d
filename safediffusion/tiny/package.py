"""The shipped folders: what the build has trained so far, in the formats that diffusers and transformers read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from safediffusion import files, weights
from safediffusion.errors import UserError
from safediffusion.tiny import flowing, networks
from safediffusion.tiny.folders import replacing
from safediffusion.tiny.scenes import SIZE

PARTS = ("detector", "guard", "pipeline", "flow", "reward", "judge")
_BASES = ("base_settle", "base_upright", "base_order", "base")  # checkpoints of the base, the newest stage first
_FLOWS = ("flow_hints", "flow_settle", "flow")
LIMIT = 24_000_000  # bytes in all: the wheel carries them
# What a CLIPModel is fed with. transformers can write this file only where torchvision is installed.
_PIXELS = {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": SIZE},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": SIZE, "width": SIZE},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
    "do_convert_rgb": True,
}


def package(work: Path, out: Path) -> tuple[str, ...]:
    """Write to `out` each part that `work` holds, with the hash of every file; the names of the parts written.

    The base models are taken from their newest checkpoints (the averaged weights), so they may be packaged while they train.
    A part that `work` does not hold is left out. `out` is replaced as a whole.
    """
    check_target(out)
    with files.explained(out), replacing(out) as new:
        for name in ("detector", "guard"):
            _detector(work, name, new / name)
        _pipeline(work, new / "pipeline")
        _flow(work, new / "flow")
        schooled = work / "out" / "reward_order"
        _clip(schooled if (schooled / "model.safetensors").exists() else work / "out" / "reward", new / "reward")
        _clip(work / "out" / "judge", new / "judge")
        parts = tuple(part for part in PARTS if (new / part).is_dir())
        if not parts:
            raise UserError(f"{work} holds no trained model yet; run `safediffusion tiny build` with it as its work folder")
        _seal(new)
    return parts


def check_target(out: Path) -> None:
    """UserError unless `out` is free or holds an earlier package: it is replaced as a whole."""
    with files.explained(out):
        if out.exists() and not (out / "hashes.json").is_file() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out} exists and holds something other than packaged weights; choose another folder")


def _detector(work: Path, name: str, folder: Path) -> None:
    if (work / "out" / f"{name}.safetensors").exists():
        folder.mkdir()
        shutil.copyfile(work / "out" / f"{name}.safetensors", folder / "model.safetensors")


def _clip(source: Path, folder: Path) -> None:
    """A CLIPModel with its tokenizer, and how its pictures are normalised."""
    if not (source / "model.safetensors").exists():
        return
    shutil.copytree(source, folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(_PIXELS, indent=2) + "\n", encoding="utf-8")


def _pipeline(work: Path, folder: Path) -> None:
    base = _newest(work, _BASES)
    if base is None or not _has_autoencoder(work):
        return
    tensors = weights.strip_prefix("average", weights.load(base)[0])
    tokenizer = CLIPTokenizer.from_pretrained(work / "out" / "tokenizer")
    text_encoder, unet = networks.text_encoder(tokenizer), networks.unet()
    text_encoder.load_state_dict(weights.strip_prefix("text", tensors))
    unet.load_state_dict(weights.strip_prefix("unet", tensors))
    StableDiffusionPipeline(
        vae=_autoencoder(work),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=networks.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    for part in ("unet", "vae"):
        _halve(folder / part / "diffusion_pytorch_model.safetensors")


def _flow(work: Path, folder: Path) -> None:
    checkpoint, heard = _newest(work, _FLOWS), work / "out" / "text_encoder_settled"
    if checkpoint is None or not (heard.is_dir() and _has_autoencoder(work)):
        return
    tokenizer = CLIPTokenizer.from_pretrained(work / "out" / "tokenizer")
    transformer = networks.transformer()
    transformer.load_state_dict(weights.strip_prefix("average", weights.load(checkpoint)[0]))
    text_encoder, text_encoder_2 = flowing.text_encoders(CLIPTextModel.from_pretrained(heard))
    StableDiffusion3Pipeline(
        vae=_autoencoder(work, shift_factor=0.0),  # this pipeline adds it, and fails where there is none
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
        transformer=transformer,
        scheduler=networks.flow_scheduler(),
    ).save_pretrained(folder)
    for file in folder.glob("*/*.safetensors"):
        _halve(file)


def _newest(work: Path, stages: Sequence[str]) -> Path | None:
    """The checkpoint of the first of these stages that has begun."""
    return next((path for name in stages if (path := work / f"{name}.safetensors").exists()), None)


def _has_autoencoder(work: Path) -> bool:
    return (work / "out" / "vae" / "diffusion_pytorch_model.safetensors").exists()


def _autoencoder(work: Path, **changed: float) -> AutoencoderKL:
    autoencoder = networks.autoencoder()
    autoencoder.load_state_dict(weights.load(work / "out" / "vae" / "diffusion_pytorch_model.safetensors")[0])
    autoencoder.register_to_config(scaling_factor=latent_scale(work), **changed)
    return autoencoder


def latent_scale(work: Path) -> float:
    """The factor by which the pipeline's latents get a standard deviation of 1."""
    return 1 / torch.load(work / "latents.pt").std().item()


def _halve(file: Path) -> None:
    """Half the size; diffusers reads float16 files into float32 models, transformers where the config says float32."""
    save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})


def _seal(folder: Path) -> None:
    """hashes.json: what each file must be, for `hub.verify`."""
    listed = sorted(path for path in folder.rglob("*") if path.is_file())
    size = sum(path.stat().st_size for path in listed)
    if size > LIMIT:
        raise UserError(f"the weights take {size:,} bytes, but the package carries at most {LIMIT:,}")
    for path in listed:
        path.chmod(0o644)  # some writers leave files that only their owner can read
    files.write_json(folder / "hashes.json", {path.relative_to(folder).as_posix(): weights.sha256(path) for path in listed})
