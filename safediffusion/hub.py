"""Where a model lives: a local folder, a model embedded in this package, or a repository of the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from safediffusion.errors import UserError
from safediffusion.files import write_json
from safediffusion.weights import sha256

EMBEDDED = Path(str(resources.files("safediffusion"))) / "tiny" / "weights"
EMBEDDED_MODELS = {"pictograms": "pipeline", "pictograms-flow": "flow"}  # a Stable Diffusion 1 and a Stable Diffusion 3 of small size, each by its folder

# Only subfolders: at the top of many repositories lie single-file checkpoints of several GB that nobody here reads.
_WANTED = ["model_index.json", "*/*.json", "*/*.txt", "*/*.model", "*/*.safetensors"]
# Other precisions, shards of them, and folders of parts that model_index.json does not name.
_UNWANTED = ["*.fp16.safetensors", "*.fp16-*.safetensors", "*.non_ema.safetensors", "safety_checker/*", "text_encoders/*", "vae_1_0/*"]
INSTEAD = "give a local folder that holds the model instead"
_SETTLED = 3 * 10**9  # nanoseconds: the coarsest clocks of file systems count two seconds
_ORIGIN = ("_name_or_path", "_diffusers_version", "_commit_hash", "transformers_version")  # in a configuration: who wrote it, and from where
_WEIGHT_FOLDERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "unet", "vae")


def cache_folder() -> Path:
    """Where this package keeps what can be made or fetched again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "safediffusion"


def known_sha256(path: Path) -> str:
    """The sha256 of a file, from the user's cache where the file has the size and the time of change that it had when it was hashed.

    For names of what can be made again, where hashing gigabytes at every start is not worth it; not for what vouches for a file. Of one that changed
    within the last seconds nothing is kept: it could change again before the clock of its folder moves on.
    """
    place, state = path.resolve(), path.stat()
    kept = cache_folder() / "hashes" / f"{hashlib.sha256(str(place).encode()).hexdigest()[:32]}.json"
    facts = {"file": str(place), "bytes": state.st_size, "modified": state.st_mtime_ns}
    try:
        found = json.loads(kept.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        found = None
    if isinstance(found, dict) and "sha256" in found and facts.items() <= found.items():
        return str(found["sha256"])
    digest = sha256(path)
    if time.time_ns() - state.st_mtime_ns > _SETTLED:
        write_json(kept, {**facts, "sha256": digest})
    return digest


def resolve_model(name: str, revision: str | None = None) -> Path:
    """The folder of a diffusers pipeline, given as a local folder, `pictograms` or `pictograms-flow` (embedded), or a hub id such as org/name.

    A hub model is taken from the local cache where it is there, whatever the hub holds by now; `revision` pins it.
    Raises UserError for a folder that does not exist and a model that cannot be had.
    """
    return local_model(name, revision) or _cached(name, revision) or _downloaded(name, revision)


def local_model(name: str, revision: str | None = None) -> Path | None:
    """`resolve_model` for a folder and an embedded model, None for a hub id, which is not looked for. UserError for what is none of them."""
    path = Path(name).expanduser()
    if name in EMBEDDED_MODELS or (name and path.exists()):
        if revision is not None:
            raise UserError(f"{name} is not a hub model, so it has no revision {revision!r}; leave the revision out")
        if name in EMBEDDED_MODELS:
            return verify(EMBEDDED, EMBEDDED_MODELS[name])
        if not path.is_dir():
            raise UserError(f"{name} is a file; give a folder in the diffusers layout (one that holds model_index.json)")
        return path
    owner, slash, rest = name.partition("/")
    if name.startswith((".", "/", "~")) or (slash and ("/" in rest or not rest or Path(owner).is_dir())):
        raise UserError(f"{name} does not exist")
    if not _is_hub_id(name):
        raise UserError(f"{name!r} is no model: give a local folder, `pictograms`, `pictograms-flow`, or a hub id such as org/name")
    return None


def resolve_part(name: str, files: Sequence[str]) -> Path:
    """The folder of one saved component, such as an encoder: a local folder, or a hub id, pinned as org/name@REVISION.

    `files` are patterns of what is wanted of a repository. Raises UserError for a folder that does not exist and a component
    that cannot be had.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    name, _, revision = name.partition("@")
    if name.startswith((".", "/", "~")) or not _is_hub_id(name):
        raise UserError(f"{name} does not exist; give a local folder that save_pretrained wrote, or a hub id such as org/name@REVISION")
    return _fetched(name, revision or None, files)


def resolve_file(name: str, file: str, revision: str | None, instead: str) -> Path:
    """One file of a data set on the hub. UserError, which ends in `instead`, where it cannot be had."""
    from huggingface_hub import snapshot_download

    with _explained(name, revision, instead):
        path = Path(snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=[file])) / file
    if not path.is_file():
        raise UserError(f"{name} does not hold {file}, or only part of it is in the local cache; {instead}")
    return path


def at_hand(name: str, revision: str | None = None) -> Path | None:
    """The folder of a model that needs no download; None for another one, and for what is no model."""
    folder = EMBEDDED / EMBEDDED_MODELS[name] if name in EMBEDDED_MODELS else Path(name).expanduser()
    if folder.is_dir():
        return folder
    return _cached(name, revision) if _is_hub_id(name) else None


def verify(weights: Path, part: str) -> Path:
    """The folder `weights`/`part`, after each of its files has been found to be the one named in `weights`/hashes.json."""
    listing = weights / "hashes.json"
    hashes = json.loads(listing.read_text(encoding="utf-8")) if listing.is_file() else {}
    listed = {name: digest for name, digest in hashes.items() if name.startswith(f"{part}/")}
    if not listed:
        raise UserError(f"{weights / part} is not part of this installation: {listing} does not list it; reinstall")
    for name, digest in listed.items():
        if not (weights / name).is_file():
            raise UserError(f"{weights / name} is missing; reinstall the package")
        if sha256(weights / name) != digest:
            raise UserError(f"hash mismatch: {weights / name} is not the file that was released; reinstall the package")
    return weights / part


def read_index(folder: Path) -> dict[str, Any]:
    """The model_index.json of a pipeline folder: its class and its components."""
    path = folder / "model_index.json"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} is not a diffusers pipeline: it has no model_index.json") from None
    except ValueError:
        raise UserError(f"{path} is not valid JSON") from None
    if not isinstance(index, dict) or "_class_name" not in index:
        raise UserError(f"{path} does not name a pipeline class")
    return index


def describe_model(folder: Path) -> dict[str, Any]:
    """Which model this is, for protocol records: the pipeline class, the sha256 of each weight file by its path, and one of all settings that decide a
    picture: schedule, configurations and tokenizers, without what only says where they come from."""
    files = sorted(path for part in _WEIGHT_FOLDERS for path in (folder / part).glob("*.safetensors"))
    return {
        "pipeline": read_index(folder)["_class_name"],
        "sha256": {path.relative_to(folder).as_posix(): sha256(path) for path in files},
        "settings": hashlib.sha256("\n".join(_settings(folder)).encode()).hexdigest(),
    }


def _settings(folder: Path) -> Iterator[str]:
    for part in (*_WEIGHT_FOLDERS, "scheduler", "tokenizer", "tokenizer_2", "tokenizer_3"):
        for path in sorted(each for each in (folder / part).glob("*") if each.suffix in (".json", ".txt", ".model") and not each.name.endswith(".index.json")):
            told = sha256(path)
            if path.suffix == ".json" and isinstance(table := json.loads(path.read_text(encoding="utf-8")), dict):
                told = json.dumps({key: value for key, value in table.items() if key not in _ORIGIN}, sort_keys=True)
            yield f"{part}/{path.name} {told}"


def _is_hub_id(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name  # the hub's few models without an owner are no diffusion pipelines


def _cached(name: str, revision: str | None) -> Path | None:
    """The cached snapshot, or None where there is none or another program fetched only some of its files."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    return folder if _is_whole(folder) else None


def _downloaded(name: str, revision: str | None) -> Path:
    folder = _fetched(name, revision, _WANTED, _UNWANTED)
    if not _is_whole(folder):
        raise UserError(f"{name} is not a diffusers pipeline with safetensors weights, or only part of it is in the local cache; {INSTEAD}")
    return folder


def _fetched(name: str, revision: str | None, wanted: Sequence[str], unwanted: Sequence[str] = ()) -> Path:
    from huggingface_hub import snapshot_download

    with _explained(name, revision, INSTEAD):
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(wanted), ignore_patterns=list(unwanted)))


@contextmanager
def _explained(name: str, revision: str | None, instead: str) -> Iterator[None]:
    """Turns what the hub says of a repository into a UserError of one sentence, which ends in what to do."""
    from huggingface_hub.errors import GatedRepoError, HTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except GatedRepoError:
        raise UserError(f"{name} is gated: accept its terms at huggingface.co/{name} and run `hf auth login`, or {instead}") from None
    except RepositoryNotFoundError:
        raise UserError(f"{name} is not on the hub, or it is private: check the name, run `hf auth login`, or {instead}") from None
    except RevisionNotFoundError:
        raise UserError(f"{name} has no revision {revision!r}") from None
    except LocalEntryNotFoundError:
        raise UserError(f"{name} is not in the local cache and the hub cannot be reached; {instead}") from None
    except (HTTPError, OSError) as error:  # HTTPError is that of the HTTP library, whichever one this hub client uses
        raise UserError(f"{name} cannot be downloaded ({str(error).splitlines()[0]}); {instead}") from None


def _is_whole(folder: Path) -> bool:
    """Whether the weights of every part that model_index.json names are there, each shard of them; those of other precisions do not count."""
    if not (folder / "model_index.json").is_file():
        return False
    named = [part for part in _WEIGHT_FOLDERS if (read_index(folder).get(part) or [None])[0] is not None]
    files = {part: [path for path in (folder / part).glob("*.safetensors") if not any(path.match(pattern) for pattern in _UNWANTED)] for part in named}
    shards = {path.parent / name for part in named for path in (folder / part).glob("*.safetensors.index.json") for name in set(_shards(path))}
    return all(files.values()) and all(path.is_file() for path in shards)


def _shards(listing: Path) -> Iterable[str]:
    return json.loads(listing.read_text(encoding="utf-8"))["weight_map"].values()
