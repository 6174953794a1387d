"""Text encoders that are dropped: the same conditions, from a disk that several runs and processes share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from safediffusion.errors import UserError
from safediffusion.policies.conditioner import Conditioner
from safediffusion.policies.embeddings import SHARD, Embeddings
from safediffusion.policies.latent import PolicySettings, load_policy

TEXTS = [f"a {colour} {thing}" for colour in ("red", "blue") for thing in ("cat", "dog", "knife", "kitchen", "in a kitchen")]
DROP = PolicySettings(text_encoders="drop")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "safediffusion" / "conditions"


def loads(encode: Conditioner) -> list[int]:
    """Counts how often the encoders are loaded from now on."""
    load, counted = encode.load, []
    encode.load = lambda: counted.append(1) or load()
    return counted


@pytest.mark.parametrize(("model", "dtype"), [("", "float32"), ("sd3", "bfloat16"), ("flux-dev", "float32")])
def test_the_same_bits_as_encoders_that_are_kept(tiny_pipeline: Path, folder_of: Callable[[str], Path], model: str, dtype: str) -> None:
    folder = folder_of(model) if model else tiny_pipeline
    kept = load_policy(folder, PolicySettings(dtype=dtype)).encode
    dropped = load_policy(folder, PolicySettings(dtype=dtype, text_encoders="drop"), texts=TEXTS).encode
    again = loads(dropped)
    assert all(encoder.device.type == "meta" for encoder in dropped.text.encoders.values())
    assert torch.equal(dropped(TEXTS), kept(TEXTS))
    assert torch.equal(dropped.unconditional, kept.unconditional)
    assert not again
    assert torch.equal(dropped(["a new one"]), kept(["a new one"]))
    assert len(again) == 1
    assert torch.equal(load_policy(folder, PolicySettings(dtype=dtype, text_encoders="drop")).encode(["a new one"]), kept(["a new one"]))


def test_the_next_run_loads_no_encoder(tiny_pipeline: Path) -> None:
    load_policy(tiny_pipeline, DROP, texts=TEXTS)
    encode = load_policy(tiny_pipeline, PolicySettings(text_encoders="drop", prompt_cache=2)).encode
    again = loads(encode)
    encode.prepare(TEXTS)
    encode(TEXTS)
    assert (len(encode.kept), again) == (2, [])


def test_few_conditions_stay_on_the_device_where_the_disk_has_them(tiny_pipeline: Path) -> None:
    dropped, kept, own = (load_policy(tiny_pipeline, settings).encode for settings in (DROP, PolicySettings(), PolicySettings(text_encoders="drop", prompt_cache=300)))
    assert (dropped.capacity, kept.capacity, own.capacity) == (256, 4096, 300)


def test_what_conditions_depend_on_keeps_them_apart(tiny_pipeline: Path, edited: Callable[..., Path], cache: Path) -> None:
    load_policy(tiny_pipeline, DROP, texts=TEXTS)
    load_policy(tiny_pipeline, PolicySettings(text_encoders="drop", image_size=64), texts=TEXTS)  # of which a prompt knows nothing
    assert len(list(cache.iterdir())) == 1
    load_policy(tiny_pipeline, PolicySettings(text_encoders="drop", dtype="bfloat16"), texts=TEXTS)
    load_policy(edited("text_encoder/config.json", hidden_act="gelu"), DROP, texts=TEXTS)
    assert len(list(cache.iterdir())) == 3


def test_dropped_encoders_are_told_of_long_prompts(tiny_pipeline: Path) -> None:
    encode = load_policy(tiny_pipeline, DROP).encode
    with pytest.warns(UserWarning, match="1 of 2 prompts have more than 24 tokens"):
        encode.warn_of_long(["cat and " * 30, "a cat"])


def test_a_condition_from_disk_can_be_trained_with(tiny_pipeline: Path) -> None:
    policy = load_policy(tiny_pipeline, DROP, texts=["a cat"])
    with torch.inference_mode():
        policy.encode(["a cat", ""])
    policy.predict(torch.zeros(1, 4, 8, 8), torch.tensor(500), policy.encode(["a cat"]), 2.0).sum().backward()
    assert any(weight.grad is not None for weight in policy.parameters())


def test_many_texts_are_few_files(tmp_path: Path) -> None:
    there = Embeddings(tmp_path)
    texts = [f"text {number}" for number in range(2 * SHARD)]
    for start in (0, SHARD):
        there.write({text: torch.full((2, 3), float(start + number)) for number, text in enumerate(texts[start : start + SHARD])})
    assert len(list(tmp_path.iterdir())) == 2
    beside = Embeddings(tmp_path)  # another process
    assert beside.missing([*texts, "new", "new"]) == ["new"]
    assert torch.equal(beside.read("text 70"), torch.full((2, 3), 70.0))
    there.write({"new": torch.ones(1)})
    assert beside.missing(["new"]) == []


def test_a_broken_file_is_written_again_and_a_lost_one_is_said(tmp_path: Path) -> None:
    there = Embeddings(tmp_path)
    there.write({"a": torch.ones(2), "b": torch.zeros(2)})
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:20])
    assert Embeddings(tmp_path).missing(["a"]) == ["a"]
    there.write({"a": torch.ones(2), "b": torch.zeros(2)})
    assert list(tmp_path.iterdir()) == [file]
    assert torch.equal(there.read("a"), torch.ones(2))
    file.unlink()
    with pytest.raises(UserError, match="was removed or broken while it was in use"):
        there.read("b")
