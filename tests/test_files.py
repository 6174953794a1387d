"""Files: whole or absent, and faults told in the user's words. Root may write anywhere, so denials are real ones of the OS."""

import errno
import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safediffusion.errors import UserError
from safediffusion.files import append_jsonl, explained, read_jsonl, read_text, write_bytes, write_json, write_text

quick = settings(max_examples=50)

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="/dev/full is Linux's")


def test_text_is_written_with_its_folders_and_replaced(tmp_path):
    path = tmp_path / "a" / "b" / "note.txt"
    write_text(path, "one\n")
    write_text(path, "zwölf\r\n")
    assert path.read_bytes() == "zwölf\r\n".encode()
    assert [p.name for p in path.parent.iterdir()] == ["note.txt"]


def test_a_file_is_readable_by_whom_the_umask_lets(tmp_path):
    before = os.umask(0o022)
    try:
        write_text(tmp_path / "note.txt", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "note.txt").stat().st_mode & 0o777 == 0o644


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "note.txt"
    write_text(path, "old")
    with pytest.raises(TypeError):
        write_bytes(path, "text is not bytes")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_in_the_way_is_named(tmp_path):
    with pytest.raises(UserError, match="is a folder"):
        write_text(tmp_path, "x")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be reached|part of its path is a file"):
        write_text(tmp_path / "file" / "note.txt", "x")


@needs_full
def test_a_full_disk_is_named():
    with pytest.raises(UserError, match="/dev/full is full; free some space"):
        append_jsonl(FULL, {"step": 1})


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_every_fault_of_the_system_is_one_sentence_with_the_path(code):
    with pytest.raises(UserError, match=r"out/run") as caught, explained("out/run"):
        raise OSError(code, os.strerror(code))
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)


def test_other_errors_pass_through():
    with pytest.raises(ZeroDivisionError), explained("x"):
        raise ZeroDivisionError


def test_json_writes_what_is_not_finite_as_null(tmp_path):
    path = tmp_path / "results.json"
    write_json(path, {"rate": math.nan, "list": [1.5, math.inf, {"x": -math.inf}], "pair": (1, 2), "name": "é"})
    assert json.loads(path.read_text()) == {"rate": None, "list": [1.5, None, {"x": None}], "pair": [1, 2], "name": "é"}


def test_jsonl_round_trip(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    for step in range(3):
        append_jsonl(path, {"step": step, "loss": math.nan, "note": "ü\n"})
    assert read_jsonl(path) == [{"step": step, "loss": None, "note": "ü\n"} for step in range(3)]
    assert len(path.read_text().splitlines()) == 3


@quick
@given(st.data())
def test_a_crash_at_any_byte_costs_no_more_than_the_line_it_cut(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("cut") / "metrics.jsonl"
    records = [{"step": step, "note": "é"} for step in range(3)]
    for record in records:
        append_jsonl(path, record)
    whole = path.read_bytes()
    kept = whole[: data.draw(st.integers(0, len(whole)))]
    path.write_bytes(kept)
    complete = kept.count(b"\n") + kept.endswith(b"}")
    assert read_jsonl(path) == records[:complete]
    append_jsonl(path, {"step": 9})
    assert read_jsonl(path) == [*records[:complete], {"step": 9}]


def test_a_fault_that_is_no_cut_is_named_with_its_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for text in ('{"a": 1}\n\n{"a":\n{"a": 2}\n', '{"a": 1}\n\n[1]\n'):
        path.write_text(text)
        with pytest.raises(UserError, match="line 3 is not a JSON object"):
            read_jsonl(path)
    with pytest.raises(UserError, match="does not exist"):
        read_jsonl(tmp_path / "absent.jsonl")


def test_text_is_read_with_or_without_a_byte_order_mark(tmp_path):
    path = tmp_path / "note.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert read_text(path) == "one\r\ntwo"
    path.write_bytes(b"one\ntwo \xe9\n")
    with pytest.raises(UserError, match="line 2 is not UTF-8"):
        read_text(path)
