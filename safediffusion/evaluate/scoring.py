"""The second stage: what an instrument says of each picture, kept in parquet files, keyed by the picture's bytes.

A picture that was painted again has another key and is scored again; a score that is there is never made twice.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from safediffusion import ranks
from safediffusion.evaluate.pictures import Stored
from safediffusion.evaluate.rows import Row
from safediffusion.files import explained, write_bytes
from safediffusion.images import image_size, load_images

Columns = dict[str, Any]  # of a batch: arrays (B,) or (B, D), or lists of text
Form = Literal["number", "vector", "text"]  # what a column holds of one picture
_ROWS_PER_FILE = 2048
_PIXELS_AT_ONCE = 16 * 512 * 512
_MOST_AT_ONCE = 256


class Instrument(Protocol):
    """Looks at pictures of one size `(B, 3, H, W)` in [0, 1]; what it says of each is a row of named columns.

    identity: all that decides what it says, for the protocol. reads_prompt: whether that depends on the row, not on the picture alone.
    """

    @property
    def identity(self) -> Mapping[str, Any]: ...
    @property
    def reads_prompt(self) -> bool: ...
    def __call__(self, images: Tensor, rows: Sequence[Row]) -> Columns: ...


@dataclass(frozen=True)
class Look:
    """A picture to look at, for a row."""

    stored: Stored
    row: Row

    def key(self, reads_prompt: bool) -> str:
        if not reads_prompt:
            return self.stored.sha256
        asked = json.dumps([self.stored.sha256, self.row.prompt.text, repr(self.row.case)])
        return hashlib.sha256(asked.encode()).hexdigest()


class Scores:
    """What one instrument has said so far, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        files = sorted(folder.glob("*.parquet"))
        with explained(folder):
            tables = [parquet.read_table(file) for file in files]
        self.folder, self._table = folder, pa.concat_tables(tables, promote_options="default") if tables else None
        self._place = {} if self._table is None else {key: place for place, key in enumerate(self._table.column("key").to_pylist())}

    def __contains__(self, key: str) -> bool:
        return key in self._place

    def columns(self, keys: Sequence[str | None]) -> Columns:
        """The columns for `keys`, in their order: float64 `(N,)` or float32 `(N, D)` with NaN, or lists with None, where a key is None or unknown."""
        if self._table is None:
            return {}
        places = np.array([-1 if key is None else self._place.get(key, -1) for key in keys])
        taken = self._table.take(np.maximum(places, 0))
        return {name: _column(taken.column(name).combine_chunks(), places < 0) for name in taken.column_names if name != "key"}


def score(instrument: Instrument, looks: Iterable[Look], folder: Path, batch: int, advance: Callable[[int], None]) -> Scores:
    """Look at what was not looked at before; all scores of the instrument. On several processes each looks at its share."""
    known, every = ranks.from_main(lambda: _known(folder)), [(look.key(instrument.reads_prompt), look) for look in looks]
    ordered = [(key, look) for key, look in sorted(dict(every).items(), key=lambda pair: pair[0]) if key not in known]
    advance(len(every) - len(ordered))
    mine = [ordered[place] for place in range(ranks.index(), len(ordered), ranks.count())]
    for start in range(0, len(mine), _ROWS_PER_FILE):
        _score(instrument, dict(mine[start : start + _ROWS_PER_FILE]), folder, batch, advance)
    ranks.gathered(None)  # nobody reads before all have written
    return Scores(folder)


def _known(folder: Path) -> set[str]:
    """The keys alone: embeddings beside them may be large."""
    from pyarrow import parquet

    with explained(folder):
        return {key for file in folder.glob("*.parquet") for key in parquet.read_table(file, columns=["key"]).column("key").to_pylist()}


def _score(instrument: Instrument, looks: Mapping[str, Look], folder: Path, batch: int, advance: Callable[[int], None]) -> None:
    """One file of scores."""
    by_size: dict[tuple[int, int], list[tuple[str, Look]]] = {}
    for key, look in looks.items():
        by_size.setdefault(image_size(look.stored.file), []).append((key, look))
    keys: list[str] = []
    parts: list[Columns] = []
    for (width, height), group in by_size.items():
        at_once = batch or max(1, min(_MOST_AT_ONCE, _PIXELS_AT_ONCE // (width * height)))
        for start in range(0, len(group), at_once):
            some = group[start : start + at_once]
            images = load_images([look.stored.file for _, look in some])
            with torch.no_grad():
                parts.append(instrument(images, [look.row for _, look in some]))
            keys += [key for key, _ in some]
            advance(len(some) * ranks.count())
    _write(keys, parts, folder)


def _write(keys: Sequence[str], parts: Sequence[Columns], folder: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    columns: dict[str, Any] = {"key": pa.array(keys)}
    for name in parts[0]:
        values = [part[name] for part in parts]
        if isinstance(values[0], list):
            columns[name] = pa.array([value for each in values for value in each], pa.string())
            continue
        whole = np.concatenate([np.asarray(each, dtype=np.float32) for each in values])
        columns[name] = pa.array(whole) if whole.ndim == 1 else pa.FixedSizeListArray.from_arrays(pa.array(whole.ravel()), whole.shape[1])
    buffer = io.BytesIO()
    parquet.write_table(pa.table(columns), buffer)
    name = hashlib.sha256("".join(keys).encode()).hexdigest()[:16]
    write_bytes(folder / f"{name}.parquet", buffer.getvalue())


def _column(array: Any, missing: np.ndarray) -> Any:
    import pyarrow as pa

    if pa.types.is_string(array.type):
        return [None if no else value for no, value in zip(missing, array.to_pylist(), strict=True)]
    if pa.types.is_fixed_size_list(array.type):
        whole = array.flatten().to_numpy(zero_copy_only=False).reshape(len(array), array.type.list_size).astype(np.float32)
        return np.where(missing[:, None], np.float32(np.nan), whole)
    return np.where(missing, np.nan, array.to_numpy(zero_copy_only=False).astype(np.float64))
