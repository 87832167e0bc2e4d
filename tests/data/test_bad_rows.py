"""Rows that cannot be used: named with file, line and reason, and then the end of the run or skipped and counted."""

from __future__ import annotations

import json
import tracemalloc
import warnings
from pathlib import Path

import pytest

from quietstar.data.rows import BadRows
from quietstar.data.sources import read_documents
from quietstar.errors import DataError

GOOD = b'{"text": "fine"}'


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a"', "not valid JSON: .* at column 13"),
        (b'{"text": "a"}{"text": "b"}', "not valid JSON: Extra data at column 14"),
        (b"[" * 50_000, "not usable JSON: nested too deeply"),
        (b'{"text": "a", "id": ' + b"9" * 5_000 + b"}", "not usable JSON: a whole number"),
        (b'["a"]', "holds a JSON array, needs an object with the field 'text'"),
        (b'{"body": "a"}', r"has no field 'text' \(its fields: 'body'\)"),
        (b'{"text": 3}', "field 'text' is a JSON number, needs a string"),
        (b'{"text": ["a"]}', "field 'text' is a JSON array, needs a string"),
        (b'{"text": null}', "field 'text' is a JSON null, needs a string"),
        (b'{"text": ""}', "field 'text' has no text in it"),
        (b'{"text": " \\n\\t"}', "field 'text' has no text in it"),
        (b'{"text": "caf\xe9"}', "not UTF-8 text: .*0xe9 at byte 14 of the line"),
        (b'{"text": "a\xed\xa0\x80"}', "not UTF-8 text: .*0xed at byte 12 of the line"),
        (b'{"text": "ab\\udc00"}', "field 'text' is not valid Unicode at character 2"),
        (b'{"text": "a\x00b"}', "not valid JSON: Invalid control character at column 12"),
        (b'{"text": "' + b"a" * 60_000 + b'"}', r"longer than 60000 bytes \(data\.max_row_bytes\)"),
    ],
)
def test_a_bad_line_stops_or_is_skipped(tmp_path: Path, line: bytes, reason: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\r\n".join([GOOD, b"", line, GOOD]))
    message = rf"rows\.jsonl:3: {reason}"
    with pytest.raises(DataError, match=message):
        list(read_documents(file, max_row_bytes=60_000))
    bad_rows = BadRows("skip")
    with pytest.warns(UserWarning, match=message + r".* \(row skipped\)"):
        documents = list(read_documents(file, bad_rows=bad_rows, max_row_bytes=60_000))
    assert [document.place for document in documents] == [f"{file}:1", f"{file}:4"]
    assert bad_rows.count == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"one\ncaf\xe9\n", r"b\.txt:2: not UTF-8 text"),
        (b"PK\x03\x04\x00\x00", r"b\.txt: not UTF-8 text: it is a zip archive"),
        ("text".encode("utf-16"), r"b\.txt: not UTF-8 text: it is text in UTF-16"),
        (b" \r\n", r"b\.txt: no text in it \(3 bytes, all white space\)"),
    ],
)
def test_a_bad_text_file_stops_or_is_skipped(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.txt").write_text("good")
    (tmp_path / "b.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_documents(tmp_path))
    with pytest.warns(UserWarning, match=message):
        documents = list(read_documents(tmp_path, bad_rows=BadRows("skip")))
    assert [document.text for document in documents] == ["good"]


def test_lines_up_to_the_limit_are_read(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    exact = b'{"text": "' + b"a" * 88 + b'"}'
    assert len(exact) == 100
    for end in (b"\n", b"\r\n", b""):
        file.write_bytes(exact + end)
        assert len(list(read_documents(file, max_row_bytes=100))) == 1
        with pytest.raises(DataError, match="longer than 99 bytes"):
            list(read_documents(file, max_row_bytes=99))


def test_a_line_of_any_length_is_passed_over_in_little_memory(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    with file.open("wb") as lines:
        lines.write(GOOD + b'\n{"text": "')
        for _ in range(30):
            lines.write(b"a" * 1_000_000)
        lines.write(b'"}\n' + GOOD + b"\n")
    tracemalloc.start()
    with pytest.warns(UserWarning, match=r"rows\.jsonl:2: longer than 10000 bytes"):
        documents = list(read_documents(file, bad_rows=BadRows("skip"), max_row_bytes=10_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [document.line for document in documents] == [1, 3]
    assert peak < 2_000_000


def test_more_bad_rows_than_allowed_stop(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join([GOOD, *[b"{}"] * 4]))
    with (
        pytest.warns(UserWarning),
        pytest.raises(DataError, match=r"4 rows .* \(3\); the last one is .*rows\.jsonl:5:"),
    ):
        list(read_documents(file, bad_rows=BadRows("skip", limit=3)))


def test_twenty_are_told_and_the_others_counted(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join([GOOD, *[b"{}"] * 50]))
    bad_rows = BadRows("skip")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        list(read_documents(file, bad_rows=bad_rows))
    assert len(told) == 20
    assert "further ones are counted without a message" in str(told[-1].message)
    assert bad_rows.count == 50


def test_separators_of_unicode_end_no_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    text = "a\u2028b\u0085c\x0bd"
    file.write_text(json.dumps({"text": text}, ensure_ascii=False))
    assert [document.text for document in read_documents(file)] == [text]
