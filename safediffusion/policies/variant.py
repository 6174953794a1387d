"""A model as an evaluation names it: a pipeline folder, or one with other weights put onto it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safediffusion import ranks, weights
from safediffusion.errors import UserError
from safediffusion.hub import cache_folder, describe_model
from safediffusion.policies.conditioner import Conditioner
from safediffusion.policies.families import FAMILIES, find_family
from safediffusion.policies.family import Family
from safediffusion.policies.latent import LatentPolicy, PolicySettings, load_policy
from safediffusion.policies.pipeline import replaced
from safediffusion.policies.settings import EXACT

AS_IT_IS = EXACT.settings()  # to paint with, exactly
_LORA_FILE = "pytorch_lora_weights.safetensors"
# A weight of an adapter: of a layer by its name, as diffusers and PEFT write it, or with _ for each dot, as kohya's scripts do.
_ADAPTER = re.compile(r"(?:lora_)?(?P<layer>.+)\.(?P<part>lora_A\.weight|lora_down\.weight|lora_B\.weight|lora_up\.weight|alpha)")
_PARTS = {"lora_A.weight": "down", "lora_down.weight": "down", "lora_B.weight": "up", "lora_up.weight": "up", "alpha": "alpha"}
# Kinds of adapters that do not add (alpha / rank) * up @ down alone, by the settings of PEFT that ask for them.
_OTHER_KINDS = ("alpha_pattern", "lora_bias", "use_dora", "use_rslora")
# By what a checkpoint in the layout of the original codes is known, by pipeline class: https://github.com/CompVis/stable-diffusion, https://github.com/Stability-AI/generative-models
_UNET = "model.diffusion_model."
_FIRST_STAGE = {"UNet": (_UNET,), "autoencoder": ("first_stage_model.",)}
_SECOND_ENCODER = "conditioner.embedders.1.model."
_ORIGINAL = {
    "StableDiffusionPipeline": _FIRST_STAGE | {"text encoder": ("cond_stage_model.transformer.text_model.embeddings.", "cond_stage_model.model.token_embedding.")},
    "StableDiffusionXLPipeline": _FIRST_STAGE
    | {"text encoder": ("conditioner.embedders.0.transformer.text_model.embeddings.",), "second text encoder": (f"{_SECOND_ENCODER}token_embedding.",)},
}
# Layers of a UNet's attention in those layouts, by which kohya's scripts name them for SDXL.
_ATTENTION = re.compile(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.attentions\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Variant:
    """A diffusers folder, and a safetensors file of adapters or of a whole denoiser that goes onto it. `variant` makes one."""

    folder: Path
    addition: Path | None = None

    @cached_property
    def description(self) -> dict[str, Any]:
        """Which model this is, for protocol records: pipeline class and sha256 of every weight file, of the addition under that word."""
        described = describe_model(self.folder)
        if self.addition is not None:
            described["sha256"] = described["sha256"] | {"addition": weights.sha256(self.addition)}
        return described

    def load(self, device: str | torch.device = "cpu", settings: PolicySettings = AS_IT_IS, texts: Sequence[str] = ()) -> LatentPolicy:
        """The policy, adapters merged into its weights; `texts` as in `load_policy`. UserError where the addition does not fit the base to the last weight."""
        change = None if self.addition is None else partial(_add, self.folder, self.addition)
        return load_policy(self.folder, settings, device, texts, change)


def variant(name: str, locate: Callable[[str], Path]) -> Variant:
    """The model that `name` says: what `locate` finds, BASE+FILE (adapters, or all of a denoiser), or a checkpoint of one file, alone or as BASE+FILE.

    FILE may be a folder that holds pytorch_lora_weights.safetensors. Raises UserError for a file that is missing or not safetensors,
    and for a checkpoint that is not whole.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return Variant(_converted(path, None))
    base, plus, addition = name.partition("+")
    if not plus or path.exists():
        return Variant(locate(name))
    file = Path(addition).expanduser()
    if file.is_dir():
        file = file / _LORA_FILE
    if not file.is_file():
        raise UserError(f"{addition or 'what follows the +'} is no safetensors file and no folder with {_LORA_FILE}; write BASE+FILE")
    original = any(key.startswith(_UNET) for key in _shapes(file))
    return Variant(_converted(file, locate(base))) if original else Variant(locate(base), file)


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """The weights of a file by name; none of them is read."""
    from safetensors import SafetensorError, safe_open

    if file.suffix != ".safetensors":
        raise UserError(f"{file} is not read: formats other than safetensors can run code when they are opened; convert it to safetensors")
    try:
        with safe_open(file, "pt") as opened:
            return {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a readable safetensors file: {error}") from None


def _add(folder: Path, file: Path, denoiser: Any, encode: Conditioner) -> None:
    """Put the adapters or the denoiser of a file onto the model of `folder`, in place."""
    tensors, metadata = weights.load(file)
    if any("lora" in key for key in tensors):
        _add_lora(folder, file, denoiser, encode, tensors, metadata)
        return
    prefix, words = f"{encode.family.network}.", f"{file} is no denoiser for {folder}"
    own, given = denoiser.state_dict(), {key.removeprefix(prefix): value for key, value in tensors.items()}
    for name in sorted(own.keys() | given.keys()):
        if name not in given:
            raise UserError(f"{words}: it lacks {name}")
        if name not in own:
            raise UserError(f"{words}, which has no {name}")
        if own[name].shape != given[name].shape:
            raise UserError(f"{words}: {name} has the shape {tuple(given[name].shape)} instead of {tuple(own[name].shape)}")
    denoiser.load_state_dict(given)


@torch.no_grad()
def _add_lora(folder: Path, file: Path, denoiser: Any, encode: Conditioner, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Merge the adapters of a file: W + (alpha / rank) up @ down (arXiv 2106.09685, section 4.1).

    Not by diffusers, which goes on without what fits nowhere, gives kohya's attention layers no alpha of their own (0.42),
    and finds no attention layers of a text encoder of transformers 5.
    """
    layers, alphas = _layers(denoiser, encode), _alphas(encode, metadata, file)
    adapters: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        found = _ADAPTER.fullmatch(key)
        name = found["layer"].replace(".", "_") if found else ""
        if not found or name not in layers:
            raise UserError(f"{file} does not fit {folder}: no layer of its denoiser or text encoders takes {key}")
        adapters.setdefault(name, {})[_PARTS[found["part"]]] = tensor.float()
    for name, adapter in adapters.items():
        part, layer = layers[name]
        weight = layer.weight
        if weight.is_meta:
            raise UserError(f'{file} changes the {part}, and policy.text_encoders = "drop" reads conditions that were made without it; set it to "keep"')
        if not {"up", "down"} <= adapter.keys():
            raise UserError(f"{file} holds only a part of the adapter of {name}; fetch the file again")
        up, down = adapter["up"], adapter["down"]
        rank = len(down)
        if up.shape[:2] != (len(weight), rank) or up.numel() != len(weight) * rank or down.numel() != rank * weight[0].numel():
            raise UserError(f"{file} does not fit {folder}: {name} has weights {tuple(weight.shape)}, its adapter {tuple(up.shape)} and {tuple(down.shape)}")
        alpha = float(adapter.get("alpha", alphas.get(part, rank)))
        weight += (alpha / rank * up.flatten(1) @ down.flatten(1)).view(weight.shape).to(weight)


def _layers(denoiser: Any, encode: Conditioner) -> dict[str, tuple[str, Any]]:
    """What adapters can sit on, and its part of the pipeline, by each name that files have for it, with _ for each dot."""
    found: dict[str, tuple[str, Any]] = {}
    encoders, network = encode.text.encoders, encode.family.network
    for part, model in {network: denoiser, **encoders}.items():
        number = part.removeprefix("text_encoder").removeprefix("_") or "1"
        others = (f"{part}_text_model", f"te{number if 'text_encoder_2' in encoders else ''}_text_model")
        for name, layer in model.named_modules():
            if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
                plain = name.removeprefix("text_model.")  # has or has not a `text_model` within, as the version of transformers
                names = (plain, _original_name(plain, denoiser)) if part == "unet" else (plain,)
                prefixes = (part,) if part == network else (part, *others)
                found |= {f"{prefix}.{each}".replace(".", "_"): (part, layer) for prefix in prefixes for each in names}
    return found


def _original_name(name: str, denoiser: Any) -> str:
    """That of a layer of attention in the original layout, where blocks are counted through."""
    found = _ATTENTION.fullmatch(name)
    if not found:
        return name
    way, block, index, rest = found.groups()
    if way is None:
        return f"middle_block.1.{rest}"
    place = int(block) * (denoiser.config.layers_per_block + 1) + int(index)
    return f"input_blocks.{place + 1}.1.{rest}" if way == "down" else f"output_blocks.{place}.1.{rest}"


def _alphas(encode: Conditioner, metadata: Mapping[str, str], file: Path) -> dict[str, float]:
    """The alpha of each part of the pipeline, where the file says it beside the weights as diffusers does."""
    try:
        config = dict(json.loads(metadata.get("lora_adapter_metadata", "{}")))
        alphas = {part: config.get(f"{part}.lora_alpha") for part in (encode.family.network, *encode.text.encoders)}
        alphas = {part: float(alpha) for part, alpha in alphas.items() if alpha is not None}
    except (TypeError, ValueError):
        raise UserError(f"{file} says of its adapters what is no JSON; save them again by diffusers") from None
    for key, value in config.items():
        if value and key.endswith(_OTHER_KINDS):
            raise UserError(f"{file} holds adapters with {key.split('.')[-1]}; only plain LoRA can be added, so merge them into a pipeline folder first")
    return alphas


def _converted(file: Path, base: Path | None) -> Path:
    """The diffusers folder of a checkpoint of one file, made once in the user's cache; `base` is a folder that has its shape, tokenizer and scheduler."""
    shapes = _shapes(file)
    xl = any(key.startswith(_SECOND_ENCODER) for key in shapes)
    pipeline = find_family(base).pipeline if base is not None else "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline"
    if pipeline not in _ORIGINAL:
        raise UserError(f"{file} goes onto a {pipeline}, of which only folders are read; checkpoints of one file are read of {', '.join(_ORIGINAL)}")
    for part, signs in _ORIGINAL[pipeline].items():
        if not any(key.startswith(signs) for key in shapes):
            instead = "" if base else f"; if it belongs onto a model, name that before it: BASE+{file.name}"
            raise UserError(f"{file} is not a whole checkpoint in the original layout: it has no {part}{instead}")
    configs = []
    if base is not None:
        configs = [[path.relative_to(base).as_posix(), weights.sha256(path)] for pattern in ("*.json", "*/*.json", "*/*.txt") for path in sorted(base.glob(pattern))]
    digest = hashlib.sha256(json.dumps([weights.sha256(file), configs]).encode()).hexdigest()
    target = cache_folder() / "checkpoints" / digest[:16]
    ranks.from_main(lambda: (target / "model_index.json").is_file() or _convert(file, FAMILIES[pipeline], shapes, base, target))
    return target


def _convert(file: Path, family: type[Family], shapes: Mapping[str, Any], base: Path | None, target: Path) -> None:
    import diffusers

    instead = f"name a folder of the same shape before it: BASE+{file.name}" if base is None else f"is it of the shape of {base}?"
    try:
        offline = {} if base is None else {"config": str(base), "local_files_only": True}
        pipeline = getattr(diffusers, family.pipeline).from_single_file(str(file), **offline)
    except Exception as error:  # diffusers raises whatever its many converters raise
        reason = "weights are missing" if "meta tensor" in str(error) else " ".join(str(error).split()).split(". ")[0][:200]
        raise UserError(f"{file} cannot be read as a checkpoint of {family.pipeline} ({reason}); {instead}") from None
    for part in (part for part in family.parts if not part.startswith("tokenizer")):
        if lacking := [name for name, weight in getattr(pipeline, part).named_parameters() if weight.is_meta]:
            raise UserError(f"{file} lacks {len(lacking)} weights of the {part}, such as {lacking[0]}; {instead}")
    found, wanted = sum(key.startswith(_UNET) for key in shapes), len(pipeline.unet.state_dict())
    if found != wanted:  # diffusers leaves out what it does not know
        raise UserError(f"{file} has {found} weights of a UNet, {wanted} of which are known; {instead}")
    with replaced(target) as new:
        pipeline.save_pretrained(new)
