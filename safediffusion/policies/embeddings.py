"""Conditions of prompts on disk, by content: what one run has encoded, the next one reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from safediffusion import weights
from safediffusion.errors import UserError
from safediffusion.hub import cache_folder, known_sha256
from safediffusion.policies.family import Family
from safediffusion.provenance import versions

SHARD = 64  # texts of a file: one takes up to 4 MB, and a file for each would be thousands of waits for the disk


@dataclass(frozen=True, eq=False)
class Embeddings:
    """Conditions `(L, D)` by their text, in files of several under `folder`.

    Several processes may read and write at once: a file comes whole or not at all, and one that does not read is written again.
    """

    folder: Path
    places: dict[str, Path] = field(default_factory=dict, repr=False)  # the file of each text by its key

    def missing(self, texts: Iterable[str]) -> list[str]:
        """Those of `texts` that are not there, each once."""
        unknown = [text for text in dict.fromkeys(texts) if _key(text) not in self.places]
        if unknown:  # by now another process may have them
            for path in set(self.folder.glob("*.safetensors")) - set(self.places.values()):
                self.places.update(dict.fromkeys(_keys(path), path))
        return [text for text in unknown if _key(text) not in self.places]

    def write(self, conditions: Mapping[str, Tensor]) -> None:
        """Into one file: hand over up to `SHARD` at once."""
        found = {_key(text): condition for text, condition in conditions.items()}
        path = self.folder / f"{hashlib.sha256(' '.join(found).encode()).hexdigest()[:16]}.safetensors"
        weights.save(path, found)
        self.places.update(dict.fromkeys(found, path))

    def read(self, text: str) -> Tensor:
        """One that is not `missing`, on the CPU. UserError where its file is gone since it was seen."""
        path = self.places[_key(text)]
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(_key(text))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} was removed or broken while it was in use ({error}); run the same command again") from error


def stored(family: Family, folder: Path, dtype: torch.dtype, device: torch.device) -> Embeddings:
    """Those of the text encoders of a pipeline folder, in the user's cache.

    Its name holds all that a condition's last bit may depend on: the files of encoders and tokenizers, the precision, the kind
    of device, and the versions of what computes it.
    """
    parts = [part for part in family.parts if part.startswith(("text_encoder", "tokenizer"))]
    files = sorted(path for part in parts for path in (folder / part).glob("*") if path.is_file())
    facts = [
        family.pipeline,
        [(path.relative_to(folder).as_posix(), known_sha256(path)) for path in files],
        [str(dtype), device.type],
        [versions().get(package) for package in ("safediffusion", "transformers", "torch")],
    ]
    return Embeddings(cache_folder() / "conditions" / hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16])


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _keys(path: Path) -> list[str]:
    """What a file holds; nothing where it does not read."""
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError):
        return []
