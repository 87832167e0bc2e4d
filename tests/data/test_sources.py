"""Reading documents: what is read, and what every kind of bad file is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quietstar.data.sources import Document, read_documents
from quietstar.errors import DataError


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path: Path, field: str = "text") -> list[Document]:
    return list(read_documents(path, field))


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    file = write(tmp_path / "book.txt", "Chapter 1\n\nIt was a dark night.\n")
    assert read(file) == [Document("Chapter 1\n\nIt was a dark night.\n", str(file), None)]


def test_a_jsonl_line_is_one_document_and_blank_lines_are_none(tmp_path: Path) -> None:
    lines = [json.dumps({"text": "first", "id": 1}), "", json.dumps({"text": "second \u2028 line"}), ""]
    file = write(tmp_path / "rows.jsonl", "\n".join(lines))
    assert read(file) == [Document("first", str(file), 1), Document("second \u2028 line", str(file), 3)]


def test_another_field_can_be_named(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", '{"body": "words", "text": 3}\n')
    assert [document.text for document in read(file, "body")] == ["words"]


def test_a_directory_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    write(tmp_path / "b.txt", "second")
    write(tmp_path / "a.jsonl", '{"text": "first"}\n')
    write(tmp_path / "c.txt", "third")
    write(tmp_path / "readme.md", "not read")
    (tmp_path / "more.txt").mkdir()
    assert [document.text for document in read(tmp_path)] == ["first", "second", "third"]


@pytest.mark.parametrize("content", [b"a\r\nb\rc\n", b"\xef\xbb\xbfa\nb\nc\n"])
def test_line_breaks_become_one_kind_and_a_byte_order_mark_goes(tmp_path: Path, content: bytes) -> None:
    assert read(write(tmp_path / "a.txt", content))[0].text == "a\nb\nc\n"


def test_a_byte_order_mark_before_json_goes(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "x"}\r\n{"text": "y"}\r\n')
    assert [document.text for document in read(file)] == ["x", "y"]


@pytest.mark.parametrize("content", ["", " \n\t\r\n "])
def test_a_file_without_text(tmp_path: Path, content: str) -> None:
    file = write(tmp_path / "a.txt", content)
    with pytest.raises(DataError, match=rf"a.txt: no text in it \({len(content)} bytes, all white space\)"):
        read(file)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *((name, content) for name in ("a.jsonl", "a.json", "a.csv") for content in ("", " \n \r\n ")),
        ("a.tsv", ""),
        ("a.json", "[]"),
        ("a.json", " [\n]\n"),
        ("a.csv", "id,text\n"),
        ("a.csv", "text"),
        ("a.tsv", "id\ttext\r\n\r\n"),
    ],
)
def test_a_file_without_rows(tmp_path: Path, name: str, content: str) -> None:
    """`[]` was said to be 2 bytes of white space, and so was a header."""
    with pytest.raises(DataError, match=rf"{name}: has no rows, needs at least one$"):
        read(write(tmp_path / name, content))


def test_an_empty_file_among_others_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "text")
    write(tmp_path / "b.txt", "\n")
    with pytest.raises(DataError, match=r"b\.txt: no text"):
        read(tmp_path)


def test_invalid_utf8_names_the_line_and_the_byte(tmp_path: Path) -> None:
    file = write(tmp_path / "latin.txt", b"one\ntwo\ncaf\xe9 three\n")
    with pytest.raises(DataError, match=r"latin\.txt:3: not UTF-8 text: .*0xe9 at byte 4 of the line"):
        read(file)


def test_invalid_utf8_in_jsonl_names_the_line_and_the_byte(tmp_path: Path) -> None:
    file = write(tmp_path / "latin.jsonl", b'{"text": "ok"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"latin\.jsonl:2: not UTF-8 text: .*0xff at byte 11 of the line"):
        read(file)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', r"a\.jsonl:2: not valid JSON: .* at column \d+"),
        ("[" * 100_000, r"a\.jsonl:2: not usable JSON: nested too deeply"),
        ('["a"]', r"a\.jsonl:2: holds a JSON array, needs an object with the field 'text'"),
        ("null", r"a\.jsonl:2: holds a JSON null, needs an object"),
        ('{"txt": "a", "id": 1}', r"a\.jsonl:2: has no field 'text' \(its fields: 'txt', 'id'\); data\.field names"),
        ("{}", r"a\.jsonl:2: has no field 'text' \(its fields: none\)"),
        ('{"text": 5}', r"a\.jsonl:2: field 'text' is a JSON number, needs a string"),
        ('{"text": true}', r"a\.jsonl:2: field 'text' is a JSON boolean, needs a string"),
        ('{"text": null}', r"a\.jsonl:2: field 'text' is a JSON null, needs a string"),
        ('{"text": {"a": 1}}', r"a\.jsonl:2: field 'text' is a JSON object, needs a string"),
        ('{"text": " \\n"}', r"a\.jsonl:2: field 'text' has no text in it"),
        ('{"text": "ab\\ud800"}', r"a\.jsonl:2: field 'text' is not valid Unicode at character 2"),
    ],
)
def test_a_bad_jsonl_line_is_named_with_its_reason(tmp_path: Path, line: str, message: str) -> None:
    file = write(tmp_path / "a.jsonl", '{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        read(file)


def test_a_path_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.txt: no such file or directory"):
        read(tmp_path / "nothing.txt")


def test_a_directory_without_text_files(tmp_path: Path) -> None:
    write(tmp_path / "README.md", "text")
    write(tmp_path / "a.png", "image")
    with pytest.raises(DataError, match=r"no file that can be read .*\(1 \S+, 1 \S+ left out\); needs \.txt, .*\.csv"):
        read(tmp_path)
