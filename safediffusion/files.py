"""Text on disk: written whole or not at all, read with errors that name the file and the line."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from safediffusion.errors import UserError

_REASONS = {
    errno.ENOENT: "{path} does not exist",
    errno.EISDIR: "{path} is a folder; a file was expected",
    errno.ENOTDIR: "{path} cannot be reached: a part of its path is a file, not a folder",
    errno.EEXIST: "{path} cannot be reached: a part of its path is a file, not a folder",
    errno.EACCES: "no permission to use {path}; change its permissions or choose another folder",
    errno.EPERM: "no permission to use {path}; change its permissions or choose another folder",
    errno.EROFS: "{path} lies on a read-only disk; choose another folder",
    errno.ENOSPC: "the disk that holds {path} is full; free some space and run the same command again",
    errno.EDQUOT: "the disk quota that holds {path} is used up; free some space and run the same command again",
    errno.ENAMETOOLONG: "the name of {path} is too long",
}


@contextmanager
def explained(path: Path | str) -> Iterator[None]:
    """Turns what the operating system says of `path` into a UserError of one sentence."""
    try:
        yield
    except SafetensorError as error:  # its own words for what the system said, with the number at the end
        if not (number := re.search(r"os error (\d+)", str(error))):
            raise
        reason = _REASONS.get(int(number[1]), "{path} cannot be used: {error}")
        raise UserError(reason.format(path=path, error=error)) from error
    except OSError as error:
        reason = _REASONS.get(error.errno or 0, "{path} cannot be used: {error}")
        raise UserError(reason.format(path=path, error=error.strerror or error)) from error


def read_text(path: Path | str) -> str:
    """A UTF-8 text file, with or without a byte order mark. UserError names the line that is not UTF-8."""
    with explained(path):
        data = Path(path).read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path} line {line} is not UTF-8 text; save the file as UTF-8") from None


def write_bytes(path: Path, data: bytes, sync: bool = True) -> None:
    """Write so that at every moment `path` is absent, old and whole, or new and whole.

    Without `sync` that holds for a killed process, but not for a power failure: for many small files whose hashes are kept.
    """
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                if sync:
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def check_writable(folder: Path) -> None:
    """Make `folder` where it is missing. UserError when nothing can be written there, before hours of work would be lost."""
    if folder.is_file():
        raise UserError(f"{folder} is a file, but a folder is needed")
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\n")


def write_text(path: Path, text: str) -> None:
    """Atomic, UTF-8, line ends as given."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Atomic, indented. NaN and infinities are written as null, because JSON has no word for them: null reads as missing."""
    write_text(path, json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def append_jsonl(path: Path, *records: dict[str, Any]) -> None:
    """Add a line for each record, NaN as null. A line that a crash cut short is dropped first, so that it does not swallow the next."""
    lines = "".join(json.dumps(_finite(record), ensure_ascii=False, allow_nan=False) + "\n" for record in records)
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+") as file:
            _end_last_line(file)
            file.write(lines.encode())


def read_jsonl(path: Path | str) -> list[dict[str, Any]]:
    """The records of a file of JSON lines. A last line cut short by a crash is left out; any other fault is a UserError."""
    records = []
    with explained(path), open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            record = _object(line)
            if record is not None:
                records.append(record)
            elif line.endswith(b"\n"):
                raise UserError(f"{path} line {number} is not a JSON object")
    return records


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:  # of JSON or of UTF-8: a cut may fall inside a character
        return None
    return record if isinstance(record, dict) else None


def _end_last_line(file: Any) -> None:
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return
    file.seek(size - 1)
    if file.read(1) == b"\n":
        return
    file.seek(0)
    data = file.read()
    start = data.rfind(b"\n") + 1
    if _object(data[start:]) is None:
        file.truncate(start)
    else:
        file.write(b"\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
