"""The first stage: pictures, painted once and kept in a folder with a manifest, keyed by everything that decides them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from safediffusion.errors import UserError
from safediffusion.evaluate.rows import Row
from safediffusion.evaluate.task import Painting
from safediffusion.files import append_jsonl, explained, read_jsonl, write_bytes
from safediffusion.images import png_bytes
from safediffusion.policies.autoencoder import cell
from safediffusion.policies.families import find_family
from safediffusion.policies.latent import LatentPolicy, check_side
from safediffusion.policies.pipeline import read_config
from safediffusion.process import from_scheduler
from safediffusion.rollout import Capacity, painted, walk
from safediffusion.seeds import noise_for
from safediffusion.types import Policy, Process

MANIFEST = "manifest.jsonl"
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Picture:
    """One picture to be: all that decides it besides the model. `draw` counts the latents that a torch generator of that seed draws."""

    prompt: str
    seed: int
    draw: int
    noise: str
    guidance: float
    width: int
    height: int
    steps: int
    sampler: str

    def key(self, model: str) -> str:
        """Of the picture that the model of this digest paints."""
        return hashlib.sha256(json.dumps([model, asdict(self)], sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Stored:
    """A picture on disk: its file and the sha256 of its bytes."""

    file: Path
    sha256: str


def stored_as(file: Path) -> Stored:
    """A picture file that somebody else has made."""
    with explained(file):
        return Stored(file, hashlib.sha256(file.read_bytes()).hexdigest())


def pictures_of(row: Row, painting: Painting, native: int) -> tuple[Picture, ...]:
    """The pictures of a prompt; `native` is the side that the model was trained for. UserError for a row that lacks what is asked of it."""
    width, height = (row.width, row.height) if painting.size == "row" else (native if painting.size == "model" else painting.size,) * 2
    guidance = row.guidance if painting.guidance == "row" else painting.guidance
    seed = row.seed if painting.seed == "row" else painting.seed
    for name, value in (("size", width and height), ("guidance", guidance), ("seed", seed)):
        if value is None:
            raise UserError(f"the row of {row.prompt.text[:60]!r} gives no {name}, and the task takes it from there")
    own = painting.noise == "prompt"
    places = ((seed + k, 0) if own else (seed, k) for k in range(painting.samples))
    shared = (painting.noise, guidance, width, height, painting.steps, painting.sampler)
    return tuple(Picture(row.prompt.text, at, draw, *shared) for at, draw in places)


class Album:
    """The pictures of one model in one folder. A file that is there is a finished picture; the manifest says what each shows, and its hash."""

    def __init__(self, folder: Path, model: str) -> None:
        """`model` is the digest of its weights and its guide."""
        self.folder, self.model = folder, model
        lines = read_jsonl(folder / MANIFEST) if (folder / MANIFEST).is_file() else []
        self._lines = {line["key"]: line for line in lines}

    def __getitem__(self, picture: Picture) -> Stored:
        """A picture that is there; its hash is taken anew where the file has changed since."""
        key = picture.key(self.model)
        file, line = self._file(key), self._lines.get(key)
        state = file.stat()
        if line and (state.st_size, state.st_mtime_ns) == (line["bytes"], line["modified"]):
            return Stored(file, line["sha256"])
        return stored_as(file)

    def missing(self, pictures: Iterable[Picture]) -> list[Picture]:
        """Those that are not there yet, each once, of one size after the other."""
        wanted = {picture.key(self.model): picture for picture in pictures}
        return sorted((picture for key, picture in wanted.items() if not self._file(key).is_file()), key=lambda p: (p.width, p.height, p.steps, p.sampler))

    def add(self, pictures: Sequence[Picture], images: Tensor) -> None:
        """Keep painted images `(B, 3, H, W)`."""
        for picture, image in zip(pictures, images, strict=True):
            write_bytes(self._file(picture.key(self.model)), png_bytes(image), sync=False)
        self.enter(pictures)

    def enter(self, pictures: Iterable[Picture]) -> None:
        """Write the lines of pictures that are there and have none yet, as after a kill between a file and its line."""
        lines = []
        for key, picture in {picture.key(self.model): picture for picture in pictures}.items():
            if key not in self._lines:
                stored = stored_as(self._file(key))
                state = stored.file.stat()
                place = {"file": stored.file.relative_to(self.folder).as_posix(), "sha256": stored.sha256, "bytes": state.st_size, "modified": state.st_mtime_ns}
                lines.append({"key": key, **place, **asdict(picture)})
        if lines:
            append_jsonl(self.folder / MANIFEST, *lines)
            self._lines |= {line["key"]: line for line in lines}

    def _file(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.png"


def paint(policy: LatentPolicy, pictures: Sequence[Picture], batch: int, guided: Policy | None = None) -> Iterator[tuple[Sequence[Picture], Tensor]]:
    """Paint pictures that are sorted by size: some of them at a time, with images `(B, 3, H, W)` on the CPU.

    `guided` is the policy under a guide. `batch` of them at once on each process; 0 is as many as fit. On several processes each paints its share and every one gets all.
    """
    factor = cell(policy.vae)
    for side in {side for picture in pictures for side in (picture.width, picture.height)}:
        check_side(policy.folder, policy.family, policy.vae, side, f"a picture's side of {side} pixels")
    capacity = Capacity()
    for _, group in groupby(pictures, lambda picture: (picture.width, picture.height, picture.steps, picture.sampler)):
        alike = list(group)
        width, height = alike[0].width, alike[0].height
        shape = (policy.sample_shape[0], height // factor, width // factor)
        paint_some = partial(_painted, guided or policy, _process(policy, alike[0], shape), alike, shape)
        for part, images in painted(len(alike), width * height, batch, paint_some, capacity):
            yield alike[part], images


def native_side(folder: Path) -> int:
    """Pixels of a side that the model of a diffusers folder was trained for, from its config files alone."""
    family, levels = find_family(folder), read_config(folder / "vae").get("block_out_channels", (0,))
    if not isinstance(family.side, int):
        raise UserError(f"{folder / family.network} does not say the size of its images, or they are not square; give the task a size")
    return int(family.side * 2 ** (len(levels) - 1))


def _process(policy: LatentPolicy, picture: Picture, shape: tuple[int, int, int]) -> Process:
    try:
        return from_scheduler(policy.scheduler_config, picture.steps, eta=0.0, solver=picture.sampler, tokens=policy.tokens(shape))
    except ValueError as error:
        raise UserError(f"the scheduler of {policy.folder} cannot be used: {error}") from None


@torch.no_grad()
def _painted(policy: Policy, process: Process, alike: Sequence[Picture], shape: tuple[int, int, int], which: Sequence[int]) -> Tensor:
    pictures = [alike[i] for i in which]
    condition = policy.encode([picture.prompt for picture in pictures])
    start = torch.stack([_noise(picture, shape) for picture in pictures]).to(condition.device)
    guidance = torch.tensor([picture.guidance for picture in pictures])
    return policy.decode(walk(policy, process, condition, start, guidance).clean).cpu()


def _noise(picture: Picture, shape: tuple[int, int, int]) -> Tensor:
    if picture.noise == "prompt":
        return noise_for([(picture.prompt, picture.seed)], shape)[0]
    generator = torch.Generator().manual_seed(picture.seed)
    return torch.randn((picture.draw + 1, *shape), generator=generator)[picture.draw]
