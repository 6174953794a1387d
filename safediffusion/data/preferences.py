"""Pairs of pictures of one prompt of which somebody prefers one: a folder with a manifest and the picture files that it names."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from safediffusion.data.prompts import prompt_of, read_rows
from safediffusion.data.screen import screen
from safediffusion.errors import UserError
from safediffusion.images import image_size, load_images
from safediffusion.types import Prompt

MANIFESTS = ("preferences.parquet", "preferences.csv", "preferences.jsonl")
_ROW = 'a row is {"prompt": ..., "chosen": "a.png", "rejected": "b.png"}, and if wanted "unsafe"'


@dataclass(frozen=True)
class Preference:
    """A prompt and two pictures of it."""

    prompt: Prompt
    chosen: Path
    rejected: Path


@dataclass(frozen=True, eq=False)
class Preferences:
    """Pairs by prompt, as clean latents. Each picture is read and encoded once, when it is first drawn; on SD1.x it then takes 64 kB of memory."""

    of: dict[Prompt, list[Preference]]
    encode: Callable[[Tensor], Tensor]
    latents: dict[Path, Tensor] = field(default_factory=dict)

    def prompts(self, unsafe: bool) -> tuple[Prompt, ...]:
        return tuple(prompt for prompt in self.of if prompt.unsafe == unsafe)

    def __call__(self, prompts: Sequence[Prompt], draws: Sequence[float]) -> Tensor:
        """A pair of each prompt, `(2P, C, h, w)`, the chosen picture first; `draws` in [0, 1) say which where there are several."""
        drawn = [self.of[prompt][int(draw * len(self.of[prompt]))] for prompt, draw in zip(prompts, draws, strict=True)]
        return torch.cat([self._latent(path) for pair in drawn for path in (pair.chosen, pair.rejected)])

    @torch.no_grad()
    def _latent(self, path: Path) -> Tensor:
        """Encoded alone: what a picture becomes depends on no other."""
        if path not in self.latents:
            self.latents[path] = self.encode(load_images([path]))
        return self.latents[path]


def load_preferences(path: Path | str, encode: Callable[[Tensor], Tensor], shape: Sequence[int]) -> Preferences:
    """The pairs whose prompts pass the screen; refused ones are counted on stderr. `shape` is that of the model's latents.

    Raises UserError for pictures of another size than the model's.
    """
    rows = read_preferences(path)
    screened = screen([row.prompt for row in rows])
    if screened.refused:
        warnings.warn(f"{path}: {len(screened.refused)} of {len(rows)} pairs were refused by the prompt screen", stacklevel=2)
    kept: dict[Prompt, list[Preference]] = {prompt: [] for prompt in screened.kept}
    for row in rows:
        if row.prompt in kept:
            kept[row.prompt].append(row)
    if not kept:
        raise UserError(f"{path}: the prompt screen refused all {len(rows)} pairs, so nothing is left to learn from")
    loaded = Preferences(kept, encode)
    first = next(iter(kept.values()))[0].chosen
    found, (width, height) = loaded([next(iter(kept))], [0.0]).shape[1:], image_size(first)
    if tuple(found) != tuple(shape):
        wanted = width * shape[2] // found[2], height * shape[1] // found[1]
        raise UserError(f"{first} is {width}x{height} pixels, and the model paints {wanted[0]}x{wanted[1]}; resize the pictures, or set policy.image_size")
    return loaded


def preference_texts(path: Path | str) -> tuple[str, ...]:
    """The prompts of a folder that pass the screen, each once. Of the pictures the sizes alone are read."""
    return tuple(dict.fromkeys(prompt.text for prompt in screen([row.prompt for row in read_preferences(path)]).kept))


def preferences_sha256(path: Path | str) -> str:
    """A hex digest of the prompts, the names of the pictures and their order; not of what the pictures show."""
    rows = [[row.prompt.text, row.prompt.unsafe, row.chosen.name, row.rejected.name] for row in read_preferences(path)]
    return hashlib.sha256(repr(rows).encode()).hexdigest()


def read_preferences(path: Path | str) -> tuple[Preference, ...]:
    """The rows of a folder's manifest (`preferences.jsonl`, `.csv` or `.parquet`), or of a manifest by its own name.

    A row is a prompt, the files `chosen` and `rejected` relative to the manifest, and if wanted `unsafe`, which is true where
    nothing is said. Raises UserError, with the number of the row, for one that has less, whose pictures are missing or whose size differs.
    """
    manifest = _manifest(Path(path))
    found: list[Preference] = []
    size: tuple[int, int] | None = None
    for number, row in read_rows(manifest, ("chosen", "rejected"), every=True):
        try:
            pair = Preference(prompt_of(row, unsafe=True), *(_picture(manifest.parent, row, key) for key in ("chosen", "rejected")))
            if pair.chosen == pair.rejected:
                raise ValueError(f"{pair.chosen.name} is both chosen and rejected")
            for file in (pair.chosen, pair.rejected):
                size = size or image_size(file)
                if image_size(file) != size:
                    raise ValueError(f"{file.name} is {'x'.join(map(str, image_size(file)))} pixels and those before are {'x'.join(map(str, size))}; they share a size")
        except (ValueError, UserError) as error:
            raise UserError(f"{manifest} line {number}: {error}") from None
        found.append(pair)
    if not found:
        raise UserError(f"{manifest} holds no pairs; {_ROW}")
    return tuple(found)


def _manifest(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"{path} does not exist; give a folder of sorted pairs, or its {' or '.join(MANIFESTS)}")
    if not path.is_dir():
        return path
    there = next((path / name for name in MANIFESTS if (path / name).is_file()), None)
    if there is None:
        raise UserError(f"{path} holds no {', '.join(MANIFESTS)}; {_ROW}")
    return there


def _picture(folder: Path, row: dict, key: str) -> Path:
    """Raises ValueError, in the user's words, for what is no file."""
    name = row.get(key)
    if not isinstance(name, str) or not name:
        raise ValueError(f'it has no "{key}"; {_ROW}')
    if not (folder / name).is_file():
        raise ValueError(f"{folder / name} does not exist")
    return folder / name
