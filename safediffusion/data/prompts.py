"""Prompt files: one prompt per line (.txt), per object (.jsonl), or per row (.csv)."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from safediffusion.errors import UserError
from safediffusion.files import explained, read_text
from safediffusion.types import Prompt

MAX_BYTES = 200_000_000
# No text encoder of this field reads past 512 tokens; a longer line is a wrong file, not a prompt.
MAX_CHARACTERS = 10_000
TEXT_KEYS = ("prompt", "text")
Rows = Iterator[tuple[int, dict[str, Any]]]


def read_prompts(path: Path | str, unsafe: bool = False) -> tuple[Prompt, ...]:
    """The prompts of a file, in its order, repeats kept. `unsafe` is the flag of those whose line does not say.

    .txt: blank lines and lines that begin with # are skipped. .jsonl: `prompt` or `text`, and if wanted `unsafe` (true or
    false) and `task`. .csv: columns of the same names. Other keys and columns are left unread.
    """
    path = Path(path)
    rows = READERS.get(path.suffix.lower())
    if rows is None:
        raise UserError(f"{path} is not a prompt file: its name must end in {', '.join(READERS)}")
    with explained(path):
        size = path.stat().st_size
    if size > MAX_BYTES:
        raise UserError(f"{path} has {size / 1e6:.0f} MB; a prompt file may have {MAX_BYTES // 1_000_000} MB, so split it")
    prompts = []
    for number, row in rows(path, read_text(path)):
        try:
            prompts.append(_prompt(row, unsafe))
        except ValueError as error:
            raise UserError(f"{path} line {number}: {error}") from None
    if not prompts:
        raise UserError(f"{path} holds no prompts")
    return tuple(prompts)


def prompts_sha256(prompts: Sequence[Prompt]) -> str:
    """A hex digest of everything the prompts say and of their order."""
    lines = (json.dumps([prompt.text, prompt.unsafe, prompt.task]) for prompt in prompts)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _prompt(row: dict[str, Any], unsafe: bool) -> Prompt:
    """Raises ValueError, in the user's words, for what is no prompt."""
    text = next((row[key] for key in TEXT_KEYS if key in row), None)
    if not isinstance(text, str) or not text.strip():
        raise ValueError("it has no prompt (key or column 'prompt' or 'text')")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"its prompt has {len(text):,} characters; the longest allowed is {MAX_CHARACTERS:,}")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("its prompt holds half of a surrogate pair, which is no character")
    flag = row.get("unsafe")
    if flag is not None and not isinstance(flag, bool):
        raise ValueError(f"unsafe should be true or false, but is {flag!r}")
    task = row.get("task")
    if task is not None and not isinstance(task, str):
        raise ValueError(f"task should be a string, but is {task!r}")
    return Prompt(text.strip(), unsafe if flag is None else flag, task or "")


def _txt(path: Path, text: str) -> Rows:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield number, {"prompt": line}


def _jsonl(path: Path, text: str) -> Rows:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path} line {number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f'{path} line {number} is not a JSON object such as {{"prompt": "a red circle"}}')
        yield number, row


def _csv(path: Path, text: str) -> Rows:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    columns: list[str] = []
    try:
        for cells in reader:
            if not cells:
                continue
            if not columns:
                columns = [cell.strip().lower() for cell in cells]
                if not set(TEXT_KEYS) & set(columns):
                    raise UserError(f"{path} has no column 'prompt' or 'text'; it has {', '.join(columns)}")
                continue
            if len(cells) != len(columns):
                raise UserError(f"{path} line {reader.line_num} has {len(cells)} cells, but the header has {len(columns)}")
            row = dict(zip(columns, cells, strict=True))
            yield reader.line_num, {**row, "unsafe": _flag(row.get("unsafe", ""))}
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num} is not CSV: {error}") from None


def _flag(cell: str) -> bool | str | None:
    """What the cell says; None for an empty one, the cell itself for one that is neither yes nor no."""
    word = cell.strip().lower()
    if not word:
        return None
    return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}.get(word, cell)


READERS: dict[str, Callable[[Path, str], Rows]] = {".txt": _txt, ".jsonl": _jsonl, ".csv": _csv}
