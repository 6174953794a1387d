"""Pairs that somebody has sorted: what is read, what is refused and with which words, and what becomes of the pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from safediffusion.data.preferences import load_preferences, preference_texts, preferences_sha256, read_preferences
from safediffusion.errors import UserError
from safediffusion.images import save_png
from safediffusion.types import Prompt

ROWS = (
    {"prompt": "a red circle", "chosen": "a.png", "rejected": "b.png", "unsafe": False},
    {"prompt": "a knife", "chosen": "c.png", "rejected": "d.png"},
    {"prompt": "a knife", "chosen": "a.png", "rejected": "d.png"},
)
Folder = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """A folder with four pictures of 4 x 4, the n-th of brightness n / 10, and a manifest of those rows."""

    def make(*rows: object, text: str | None = None, name: str = "preferences.jsonl") -> Path:
        for number, letter in enumerate("abcd"):
            save_png(torch.full((3, 4, 4), number / 10), tmp_path / f"{letter}.png")
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows) if text is None else text, encoding="utf-8")
        return tmp_path

    return make


def halved(images: Tensor) -> Tensor:
    return images[:, :, ::2, ::2]


def test_rows_are_read_from_every_kind_of_manifest(folder: Folder) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    place = folder(*ROWS)
    rows = read_preferences(place)
    assert [row.prompt for row in rows] == [Prompt("a red circle"), Prompt("a knife", unsafe=True), Prompt("a knife", unsafe=True)]
    assert [(row.chosen.name, row.rejected.name) for row in rows] == [("a.png", "b.png"), ("c.png", "d.png"), ("a.png", "d.png")]
    (place / "other.csv").write_text("prompt,chosen,rejected,unsafe\na red circle,a.png,b.png,no\na knife,c.png,d.png,\na knife,a.png,d.png,yes\n")
    parquet.write_table(pa.Table.from_pylist([{"unsafe": None} | row for row in ROWS]), place / "other.parquet")
    assert read_preferences(place / "other.csv") == read_preferences(place / "other.parquet") == rows
    assert preferences_sha256(place / "other.csv") == preferences_sha256(place)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"chosen": "a.png", "rejected": "b.png"}, "line 2: it has no prompt"),
        ({"prompt": "a cat", "chosen": "a.png"}, 'line 2: it has no "rejected"; a row is'),
        ({"prompt": "a cat", "chosen": "a.png", "rejected": 7}, 'line 2: it has no "rejected"'),
        ({"prompt": "a cat", "chosen": "a.png", "rejected": "z.png"}, "line 2: .*z.png does not exist"),
        ({"prompt": "a cat", "chosen": "a.png", "rejected": "a.png"}, "line 2: a.png is both chosen and rejected"),
        ({"prompt": "a cat", "chosen": "a.png", "rejected": "b.png", "unsafe": "maybe"}, "line 2: unsafe should be true or false"),
        ({"prompt": "a cat", "chosen": "a.png", "rejected": "wide.png"}, "line 2: wide.png is 8x4 pixels and those before are 4x4"),
        ({"prompt": "a cat", "chosen": "a.png", "rejected": "text.png"}, "line 2: .*text.png"),
    ],
)
def test_a_bad_row_is_refused_with_its_number(folder: Folder, row: dict, words: str) -> None:
    place = folder(ROWS[0], row)
    save_png(torch.zeros(3, 4, 8), place / "wide.png")
    (place / "text.png").write_text("no picture")
    with pytest.raises(UserError, match=words):
        read_preferences(place)


def test_what_is_no_set_of_pairs_is_refused(folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no preferences\.parquet, preferences\.csv, preferences\.jsonl; a row is"):
        read_preferences(tmp_path)
    with pytest.raises(UserError, match="holds no pairs"):
        read_preferences(folder(text="\n"))
    with pytest.raises(UserError, match="has no column 'rejected'"):
        read_preferences(folder(text="prompt,chosen\na,b\n", name="other.csv") / "other.csv")
    with pytest.raises(UserError, match="does not exist"):
        read_preferences(tmp_path / "nowhere.jsonl")
    with pytest.raises(UserError, match="nowhere does not exist; give a folder of sorted pairs"):
        read_preferences(tmp_path / "nowhere")


def test_a_picture_is_encoded_once_and_draws_say_which_pair(folder: Folder) -> None:
    calls = []

    def encode(images: Tensor) -> Tensor:
        calls.append(len(images))
        return halved(images)

    pairs = load_preferences(folder(*ROWS), encode, (3, 2, 2))
    assert (pairs.prompts(False), pairs.prompts(True)) == ((Prompt("a red circle"),), (Prompt("a knife", unsafe=True),))
    first, second = (pairs([*pairs.prompts(True), *pairs.prompts(False)], [draw, 0.99]) for draw in (0.49, 0.5))
    assert first.shape == (4, 3, 2, 2)
    for got, wanted in ((first, [0.2, 0.3, 0.0, 0.1]), (second, [0.0, 0.3, 0.0, 0.1])):
        assert torch.allclose(got.mean((1, 2, 3)), torch.tensor(wanted), atol=0.01)
    assert calls == [1] * 4


def test_pictures_of_another_size_than_the_models_are_refused(folder: Folder) -> None:
    with pytest.raises(UserError, match="is 4x4 pixels, and the model paints 16x16"):
        load_preferences(folder(*ROWS), halved, (3, 8, 8))


def test_prompts_pass_the_screen(folder: Folder) -> None:
    refused = {"prompt": "a knife and a 12 year old", "chosen": "a.png", "rejected": "b.png"}
    with pytest.warns(UserWarning, match="1 of 3 pairs were refused"):
        pairs = load_preferences(folder(*ROWS[1:], refused), halved, (3, 2, 2))
    assert pairs.prompts(True) == (Prompt("a knife", unsafe=True),)
    assert preference_texts(folder(*ROWS, refused)) == ("a red circle", "a knife")
    with pytest.warns(UserWarning, match="refused"), pytest.raises(UserError, match="refused all 1 pairs"):
        load_preferences(folder(refused), halved, (3, 2, 2))
