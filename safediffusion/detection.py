"""Detectors by name, for rewards and for instruments: which class each is, and where its weights come from."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from safediffusion.errors import UserError
from safediffusion.evaluate.rows import data_folder
from safediffusion.hub import EMBEDDED, INSTEAD, verify
from safediffusion.rewards.combined import CombinedSettings, Single, parts_of
from safediffusion.rewards.detection import DetectionSettings
from safediffusion.tiny.scenes import SIZE

Device = str | torch.device
CLIP_L = "openai/clip-vit-large-patch14"
JUDGE_KEY = "OPENAI_API_KEY"  # the environment variable that holds the judge's key


class Known(Protocol):
    """A Detector that says which one it is."""

    labels: tuple[str, ...]

    @property
    def identity(self) -> dict[str, Any]: ...

    def __call__(self, images: Tensor) -> Tensor: ...


def detector(name: str, device: Device) -> Known:
    """The detector of that name. UserError where its weights or its package cannot be had, and says what to do."""
    with advised(name):
        return DETECTORS[name](device)


@contextmanager
def advised(name: str) -> Iterator[None]:
    """The hub's advice is for models that are named on the command line; a detector's weights have their own place."""
    try:
        yield
    except UserError as error:
        own = data_folder() / str(error).split()[0]
        raise UserError(str(error).replace(INSTEAD, f"for the instrument {name} put its folder at {own} (another folder: set SAFEDIFFUSION_DATA)")) from None


def part(name: str) -> str:
    """A hub id, or the folder of the user's own copy: `org/name` in the data folder."""
    own = data_folder() / name
    return str(own) if own.is_dir() else name


def own_file(name: str, how: str) -> Path:
    """A file of the data folder; UserError tells `how` to get it."""
    file = data_folder() / name
    if not file.is_file():
        raise UserError(f"{name} is not here: {how} and put it at {file} (another folder: set SAFEDIFFUSION_DATA)")
    return file


def check_guard(options: Single | CombinedSettings, pixels: int) -> None:
    """UserError where the embedded world's guard, which a detection reward has by default, would judge pictures of another world, by their side in pixels."""
    singles = [part.reward for part in parts_of(options)]
    if pixels != SIZE and any(isinstance(each, DetectionSettings) and each.detector == "pictograms" for each in singles):
        raise UserError(
            f'the reward of kind "detection" has the detector "pictograms", which reads pictures of {SIZE} pixels of the embedded world, and this model paints {pixels}; '
            f"set its detector to one of {', '.join(name for name in DETECTORS if name != 'pictograms')}, or where its gradient is needed take a reward of another kind"
        )


def _guard(device: Device) -> Known:
    from safediffusion.detectors.hazards import HazardDetector

    return HazardDetector.load(verify(EMBEDDED, "guard") / "model.safetensors").to(device)


def _nudenet(device: Device) -> Known:
    from safediffusion.detectors.nudenet import NudeNet

    return NudeNet()


def _q16(vectors: str, device: Device) -> Known:
    from safediffusion.detectors.q16 import Q16

    return Q16.load(part(CLIP_L), own_file(vectors, "convert the prompts of github.com/ml-research/Q16 (docs/evaluate.md)"), device=device)


def _checker(device: Device) -> Known:
    from safediffusion.detectors.checker import SafetyChecker

    return SafetyChecker.load(part("CompVis/stable-diffusion-safety-checker"), device=device)


def _vit(device: Device) -> Known:
    from safediffusion.detectors.nsfw import NsfwClassifier

    return NsfwClassifier.load(part("Falconsai/nsfw_image_detection"), device=device)


def _judge(device: Device) -> Known:
    from safediffusion.detectors.judge import VlmJudge

    url, model = os.environ.get("SAFEDIFFUSION_JUDGE_URL"), os.environ.get("SAFEDIFFUSION_JUDGE_MODEL")
    if not url or not model:
        raise UserError("the judge needs an OpenAI-compatible endpoint: set SAFEDIFFUSION_JUDGE_URL and SAFEDIFFUSION_JUDGE_MODEL")
    # Many endpoints ask for no key, so one that is not there is no mistake yet: the server says whether it is.
    return VlmJudge(url, model, key_variable=JUDGE_KEY if os.environ.get(JUDGE_KEY) else None)


DETECTORS: dict[str, Callable[[Device], Known]] = {
    "pictograms": _guard,
    "nudenet": _nudenet,
    "q16": partial(_q16, "q16/prompts.safetensors"),
    "q16-finetuned": partial(_q16, "q16/prompts-finetuned.safetensors"),
    "safety-checker": _checker,
    "nsfw-vit": _vit,
    "judge": _judge,
}
