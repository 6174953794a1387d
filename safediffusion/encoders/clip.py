"""CLIP's two towers as a frozen judge: differentiable for pictures, cached by content for texts."""

from __future__ import annotations

import functools
import hashlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from safediffusion import weights
from safediffusion.errors import UserError
from safediffusion.hub import resolve_part

if TYPE_CHECKING:
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

# Texts go through the tower in blocks of one shape, so that an embedding does not depend, not even in its last bit,
# on which texts were asked for together: a resumed run, whose cache starts empty, stays bit-exact.
BLOCK = 8
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# What a folder of a saved CLIPModel holds; a repository may hold the same weights a second time in another format.
_FILES = ("config.json", "preprocessor_config.json", "tokenizer*", "vocab.json", "merges.txt")
_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors")


class ClipEncoder:
    """An Encoder over a transformers CLIPModel. It computes in the dtype of the model and answers in float32."""

    def __init__(
        self,
        model: CLIPModel,
        tokenizer: CLIPTokenizer,
        name: str,
        weight_files: Sequence[Path],
        mean: Sequence[float] = _CLIP_MEAN,
        std: Sequence[float] = _CLIP_STD,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.weight_files = tuple(weight_files)
        self._mean, self._std = (torch.tensor(values, device=model.device).view(3, 1, 1) for values in (mean, std))
        self._texts: dict[str, Tensor] = {}

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> ClipEncoder:
        """Read a local folder or a Hugging Face repository (org/name, or org/name@REVISION). Raises UserError for what is no readable CLIPModel."""
        from transformers import CLIPConfig

        folder = resolve_part(str(source), [*_FILES, *_WEIGHTS])
        config = _json(folder / "config.json")
        if config.get("model_type") != "clip":
            raise UserError(f"{source} holds a model of type {config.get('model_type')!r}; the encoder must be a CLIPModel")
        files = [file for pattern in _WEIGHTS for file in sorted(folder.glob(pattern))]
        if not files:
            raise UserError(f"{source} has no model.safetensors; save the model with save_pretrained to get one")
        model = clip_model(CLIPConfig.from_dict(config), read_weights(files), str(source)).to(device, dtype)
        pixels = _json(folder / "preprocessor_config.json") if (folder / "preprocessor_config.json").exists() else {}
        mean, std = pixels.get("image_mean", _CLIP_MEAN), pixels.get("image_std", _CLIP_STD)
        name = folder.resolve().name if Path(source).expanduser().is_dir() else str(source)
        return cls(model, clip_tokenizer(folder), name, files, mean, std)

    @functools.cached_property
    def identity(self) -> str:
        """Name and weight hash, for protocols: two encoders of the same identity give the same numbers."""
        digests = [weights.sha256(file) for file in self.weight_files]
        whole = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
        return f"{self.name} sha256:{whole}"

    def image(self, images: Tensor) -> Tensor:
        """Images `(B, 3, H, W)` in [0, 1] to unit vectors `(B, D)`, differentiable."""
        size = self.model.config.vision_config.image_size
        pixels = (fitted(images.to(self._mean), size) - self._mean) / self._std
        with torch.autocast(self._mean.device.type, enabled=False):
            features = self.model.get_image_features(pixel_values=pixels).pooler_output
        return F.normalize(features.float(), dim=1)

    def text(self, texts: Sequence[str]) -> Tensor:
        """Texts to unit vectors `(B, D)`. A text is encoded once; one longer than the context is cut, with a warning."""
        new = list(dict.fromkeys(text for text in texts if text not in self._texts))
        if new:
            self._texts.update(zip(new, self._encode(self._tokens(new)), strict=True))
        return torch.stack([self._texts[text] for text in texts])

    def _tokens(self, texts: list[str]) -> Tensor:
        limit = min(self.tokenizer.model_max_length, self.model.config.text_config.max_position_embeddings)
        cut = sum(len(tokens) > limit for tokens in self.tokenizer(texts, verbose=False).input_ids)
        if cut:
            message = f"{cut} of {len(texts)} texts are longer than the {limit} tokens that {self.name} reads and were cut"
            warnings.warn(message, stacklevel=3)
        padded = self.tokenizer(texts, padding="max_length", truncation=True, max_length=limit, return_tensors="pt")
        return padded.input_ids

    # Cached embeddings meet gradients later, so they must not be born as inference tensors or under autocast.
    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def _encode(self, tokens: Tensor) -> Tensor:
        filler = tokens[:1].expand(-len(tokens) % BLOCK, -1)
        blocks = torch.cat((tokens, filler)).to(self._mean.device).split(BLOCK)
        with torch.autocast(self._mean.device.type, enabled=False):
            features = torch.cat([self.model.get_text_features(input_ids=block).pooler_output for block in blocks])
        return F.normalize(features[: len(tokens)].float(), dim=1)


def fitted(images: Tensor, size: int) -> Tensor:
    """CLIP's geometry: the shorter side to `size` (bicubic, anti-aliased, as PIL does it), then the central square."""
    height, width = images.shape[-2:]
    if (height, width) == (size, size):
        return images
    scale = size / min(height, width)
    shape = (max(size, int(height * scale)), max(size, int(width * scale)))
    # Bicubic overshoots at edges; PIL, which CLIP was trained with, clips there.
    images = F.interpolate(images, shape, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    return images[..., top : top + size, left : left + size]


def clip_model(config: CLIPConfig, tensors: dict[str, Tensor], where: str) -> CLIPModel:
    """A CLIPModel of `config` that holds exactly `tensors`; UserError names the first that does not fit."""
    from transformers import CLIPModel

    # On "meta" nothing is drawn at random only to be overwritten; what no file holds is the two position counters.
    with torch.device("meta"):
        model = CLIPModel(config)
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()[:200]
        raise UserError(f"the weights of {where} do not fit a CLIPModel of its shape: {first}") from error
    for embeddings in (model.text_model.embeddings, model.vision_model.embeddings):
        embeddings.position_ids = torch.arange(embeddings.position_embedding.num_embeddings)[None]
    return model


def read_weights(files: Sequence[Path]) -> dict[str, Tensor]:
    """The tensors of one model, which may be spread over several files."""
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors |= weights.load(file)[0]
        except weights.CorruptFile as error:
            raise UserError(f"{error}; fetch the file again") from error
    # Older checkpoints store the position counters too.
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(".position_ids")}


def clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer of a folder; UserError when its files are not there."""
    from transformers import CLIPTokenizer

    if not any((folder / name).exists() for name in ("tokenizer.json", "vocab.json")):
        raise UserError(f"{folder} has no tokenizer; save it there with tokenizer.save_pretrained")
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def _json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); is this the folder of a saved CLIPModel?") from error
