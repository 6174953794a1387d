"""A pipeline folder in the layout of diffusers: read strictly, written whole or not at all."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safediffusion.errors import UserError
from safediffusion.hub import read_index
from safediffusion.policies.text import TextEncoders
from safediffusion.pretrained import first_sentence, load_pretrained

if TYPE_CHECKING:
    from safediffusion.policies.family import Family

# A model of a class, by its folder.
Load = Callable[[Any, Path], Any]

# Other precisions and formats of the same weights; next to a trained network they would be leftovers of another model.
_NOT_COPIED = shutil.ignore_patterns("*.bin", "*.ckpt", "*.msgpack", "*.fp16.*", "*.fp16-*", "*.non_ema.*")
# What a tokenizer is read from, any of them.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model")


def part_class(part: str, kind: str) -> Any:
    """The class of that name, from the library that has such parts of a pipeline."""
    import diffusers
    import transformers

    return getattr(transformers if part.startswith(("text_encoder", "tokenizer")) else diffusers, kind)


def load_model(kind: Any, folder: Path) -> Any:
    """A frozen float32 model of class `kind`, each weight of it from the safetensors in `folder`; UserError for what does not fit."""
    return load_pretrained(kind, folder).float().eval().requires_grad_(False)


def load_empty(kind: Any, folder: Path) -> Any:
    """A model of the shape that its config file says, with whatever its class puts into its weights: none are read."""
    try:
        if hasattr(kind, "config_class"):  # of transformers
            return kind(kind.config_class.from_pretrained(folder))
        return kind.from_config(kind.load_config(folder))
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} cannot be loaded as {kind.__name__}: {first_sentence(error)}") from error


def load_denoiser(family: Family, folder: Path, load: Load = load_model) -> Any:
    """The network that is trained, as it is in the folder: frozen, float32, on the CPU."""
    denoiser = load(part_class(family.network, family.parts[family.network]), folder / family.network)
    if family.attention is not None:
        denoiser.set_attn_processor(family.attention)
    return denoiser


def load_text(family: Family, folder: Path, load: Load = load_model) -> TextEncoders:
    """The tokenizers and text encoders of the pipeline, in float32, on the CPU."""
    here = {part: kind for part, kind in family.parts.items() if (family.index.get(part) or [None])[0] is not None}
    encoders = {part: load(part_class(part, kind), folder / part) for part, kind in here.items() if part.startswith("text_encoder")}
    read = [part for part in here if part.startswith("tokenizer") and part.replace("tokenizer", "text_encoder") in encoders]
    tokenizers = {part: _load_tokenizer(part_class(part, here[part]), folder / part) for part in read}
    for part, tokenizer in tokenizers.items():
        known = encoders[part.replace("tokenizer", "text_encoder")].config.vocab_size
        if len(tokenizer) > known:
            raise UserError(f"{folder}: the {part} has {len(tokenizer)} words, the text encoder knows {known}")
    return TextEncoders(tokenizers, encoders)


def _load_tokenizer(kind: Any, folder: Path) -> Any:
    # Without its files transformers would return a tokenizer of two words.
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        raise UserError(f"{folder} holds no tokenizer: none of {', '.join(_VOCABULARIES)}")
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:  # a package that reads its vocabulary may be missing
        raise UserError(f"{folder} cannot be loaded as {kind.__name__}: {first_sentence(error)}") from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors that a part is loaded from, each shard."""
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    return [folder / name for name in names if name not in _NOT_COPIED(str(folder), names)]


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """A part's settings. UserError where they are missing or no JSON object."""
    path = folder / name
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (TypeError, ValueError):
        raise UserError(f"{path} is not a JSON object") from None


def write_pipeline(network: Any, part: str, source: Path, target: Path) -> None:
    """The pipeline of `source` with this network as its `part`; every other part is copied as it is."""
    if target.resolve() == source.resolve():
        raise UserError(f"{target} holds the base model, which stays as it is; save to another folder")
    index = read_index(source)
    for name, classes in index.items():
        if isinstance(classes, list) and not (source / name).is_dir():  # a hub model comes without its safety checker
            index[name] = [None, None]
    if "requires_safety_checker" in index or "safety_checker" in index:
        index["requires_safety_checker"] = index.get("safety_checker", [None, None])[0] is not None
    with replaced(target) as new:
        for name, classes in index.items():
            if isinstance(classes, list) and classes[0] and name != part:
                shutil.copytree(source / name, new / name, ignore=_NOT_COPIED)
        network.save_pretrained(new / part)
        (new / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """A new empty folder that takes the place of `folder` once the block is through; an error leaves `folder` as it was.

    A folder that holds anything but a saved model is not replaced: UserError.
    """
    folder = folder.resolve()
    saved = any((folder / name).is_file() for name in ("model_index.json", "pytorch_lora_weights.safetensors"))
    if folder.exists() and not saved and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not a saved model; save to another folder")
    # By chance and not by the number of the process, which in a container is the same each time.
    new, old = (folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.{word}") for word in ("new", "old"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        with _locked(folder.parent) as alone:
            if alone:
                _sweep(folder)
            new.mkdir()
            stack.enter_context(_locked(new))
        try:
            yield new
            with _locked(folder.parent):
                _swap(new, folder, old)
        finally:
            shutil.rmtree(new, ignore_errors=True)
            if folder.exists():
                shutil.rmtree(old, ignore_errors=True)


def _swap(new: Path, folder: Path, old: Path) -> None:
    """`new` in the place of `folder`, which gets its name back where that fails."""
    if folder.exists():
        folder.rename(old)
    try:
        new.rename(folder)
    finally:
        if not folder.exists() and old.exists():
            old.rename(folder)


def _sweep(folder: Path) -> None:
    """Remove what killed processes left beside `folder`. One killed between the two renames left the saved model without its name: it gets it back."""
    form = re.compile(rf"\.{re.escape(folder.name)}\.[0-9a-f]+\.(new|old)")
    for path in sorted(path for path in folder.parent.iterdir() if form.fullmatch(path.name)):
        if path.suffix == ".old" and not folder.exists():
            path.rename(folder)
        elif path.suffix == ".old":
            shutil.rmtree(path, ignore_errors=True)
        else:
            with _locked(path, wait=False) as dead:
                if dead:
                    shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _locked(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Holds the lock of a folder, which a killed process loses; False where another has it, or on a disk that knows no locks."""
    import fcntl

    file = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except OSError:
            held = False
        yield held
    finally:
        os.close(file)
