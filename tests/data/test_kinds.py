"""Every kind of file is read by its ending and its content, and refused where the two contradict each other."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from quietstar.config.parsing import MAX_JSON_BYTES
from quietstar.data.rows import BadRows, read_json_elements
from quietstar.data.sources import read_documents, read_text
from quietstar.errors import ConfigError, DataError
from quietstar.inference.prompts import read_prompts
from quietstar.tasks.file_task import read_records

TEXTS = ["first, with a comma", 'a "quoted" one\nof two lines', "naïve ; café\t漢字", "[{ not JSON }]", "\\ back\\\\"]
ROWS = [{"id": number, "body": text} for number, text in enumerate(TEXTS)]


def table(delimiter: str) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, ["id", "body"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return out.getvalue()


def lines() -> str:
    return "\n".join(map(json.dumps, ROWS))


CONTENTS: dict[str, str] = {
    "a.jsonl": lines(),
    "a.JSONL": lines() + "\n\n",
    "a.ndjson": lines().replace("\n", "\r\n"),
    "lines.json": lines(),
    "array.json": json.dumps(ROWS),
    "array.JSON": "\n " + json.dumps(ROWS, indent=2, ensure_ascii=False),
    "array.jsonl": json.dumps(ROWS, indent=1),
    "mark.json": "\ufeff" + json.dumps(ROWS),
    "a.csv": table(","),
    "semicolon.csv": table(";"),
    "mark.CSV": "\ufeff" + table(","),
    "a.tsv": table("\t"),
}
PACKED = gzip.compress(b"x", mtime=0)  # the same in each process, since pytest makes names of it
PACKED_TWICE = gzip.compress(PACKED, mtime=0)
PACK: dict[str, Callable[[bytes], bytes]] = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".XZ": lzma.compress,
    ".zst": lambda content: pyarrow.compress(content, "zstd", asbytes=True),
}


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("name", CONTENTS)
def test_rows_of_every_kind(tmp_path: Path, name: str, packed: str) -> None:
    file = tmp_path / (name + packed)
    file.write_bytes(PACK[packed](CONTENTS[name].encode()))
    assert [document.text for document in read_documents(file, "body")] == TEXTS
    assert [record.text("body") for record in read_records(file)] == TEXTS
    assert read_text(file, "body") == "\n\n".join(TEXTS)


@pytest.mark.parametrize("name", ["a.txt", "a.TXT", "a.md", "a.text", "a"])
def test_texts_are_one_document(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes("\ufeffOne {\r\n\r\n[two]\r".encode())
    assert [(document.text, document.line) for document in read_documents(tmp_path / name)] == [
        ("One {\n\n[two]\n", None)
    ]


def test_a_packed_text_and_one_packed_without_saying_so(tmp_path: Path) -> None:
    for name in ("a.txt.gz", "b.txt"):
        (tmp_path / name).write_bytes(gzip.compress(b"words"))
    assert [document.text for document in read_documents(tmp_path)] == ["words", "words"]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.txt", b'{"text": "x"}\n{"text": "y"}\n', "holds JSON objects, one per line, .* name it .jsonl"),
        ("a.txt", b'{"text": "x"}', "holds a JSON object"),
        ("a.txt", b'{\n "text": "x"\n}\n', "holds a JSON object"),
        ("a.txt", b'{"text": "' + b"x" * 100_000 + b'"}\n{"text": "y"}\n', "holds JSON objects"),
        ("a.md", b'\xef\xbb\xbf[\n {"text": "x"}]', "holds a JSON array of objects, .* name it .json"),
        ("a.csv", b'{"text": "x"}\n{"text": "y"}\n', "holds JSON objects, one per line, and is named as a table"),
        ("a.txt", b"%PDF-1.7\n...", "it is a PDF"),
        ("a.txt", b"\x89PNG\r\n\x1a\n", "it is a PNG image"),
        ("a.csv", b"PK\x03\x04...", "it is a zip archive"),
        ("a.jsonl", b"SQLite format 3\0...", "it is an SQLite database"),
        ("a.json", '[{"text": "x"}]'.encode("utf-16"), "it is text in UTF-16"),
        ("a.json", '[{"text": "x"}]'.encode("utf-32"), "it is text in UTF-32"),
        ("a.jsonl", '\ufeff{"text": "x"}'.encode("utf-32-be"), "it is text in UTF-32"),
        ("a.csv", "text\nx".encode("utf-32"), "it is text in UTF-32"),
        ("a.jsonl", b"PAR1....PAR1", "it is a parquet file"),
        ("a.txt.gz", PACKED_TWICE, r"it is compressed \(.gz\)"),
        ("a.jsonl.gz", b'{"text": "x"}', "is not compressed as its ending .gz says"),
        ("a.txt.xz", PACKED[:12], "cannot be read"),
        ("a.parquet", b'{"text": "x"}', "not a whole parquet file"),
        ("a.docx", b"PK\x03\x04...", "is of no known kind; needs a name that ends in .txt, .*csv"),
        ("a.png.gz", PACKED, "is of no known kind"),
        ("a.json", b'[{"text": "x"}, {"text": "y"}', "the file ends within its array"),
        ("a.json", b'[{"text": "x"}] {"text": "y"}', "the file goes on after its array"),
        ("a.json", b'[{"text": "x"}, {"text": 5}]', "a.json: element 2: field 'text' is a JSON number"),
        ("a.json", b'[{"text": "x"}, {"text" "y"}]', "a.json: element 2: not valid JSON: Expecting ':'"),
        ("a.json", b'[{"text": "x"}, 7]', "a.json: element 2: holds a JSON number"),
        ("a.json", b'[{"text": "x"},,{"text": "y"}]', "a.json: element 2: "),
        *(
            ("a.json", content, f"a.json: element {number}: not valid JSON: a comma without an element beside it")
            for number, content in (
                (2, b'[{"text": "x"},]'),
                (2, b'[{"text": "x"},\n ]\n'),
                (3, b'[{"text": "x"}, {"text": "[,]"},]'),
                (1, b'[,{"text": "x"}]'),
                (1, b"[,]"),
            )
        ),
        ("a.json", b'{"data": [{"text": "x"}]}', r"a.json:1: has no field 'text' \(its fields: 'data'\)"),
        ("a.json", b"[]", "has no rows"),
        ("a.json", b"", "has no rows"),
        ("a.csv", b"id,text\n1,x,y\n", "a.csv:2: has 3 cells, and the header 2"),
        ("a.csv", b'id,text\n1,x\n2,"y\n', "a.csv:3: not valid CSV: unexpected end of data"),
        ("a.csv", b'id,text\n1,"x"y\n', "a.csv:2: not valid CSV"),
        ("a.csv", b"text,text\nx,y\n", "the header names the column 'text' 2 times"),
        ("a.csv", b"id,body\n1,x\n", r"a.csv:2: has no field 'text' \(its fields: 'id', 'body'\)"),
        ("a.csv", b"text\ncaf\xe9\n", "a.csv:2: not UTF-8 text: .*0xe9 at byte 4"),
        ("a.tsv", b"id,text\n1,x\n", r"its fields: 'id,text'"),
    ],
)
def test_what_contradicts_its_name_or_is_broken_is_refused(
    tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=reason) as told:
        list(read_documents(tmp_path / name))
    assert str(tmp_path / name) in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize(
    "text", ['{"a": 1}\nis JSON, they say.\n', "[1] A reference\n", "{braces}\n", '"quoted"\n', "# T\n"]
)
def test_prose_that_mentions_json_is_text(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    assert [document.text for document in read_documents(tmp_path / "a.txt")] == [text]


def test_a_field_longer_than_the_csv_module_allows(tmp_path: Path) -> None:
    long = "word " * 60_000
    (tmp_path / "a.csv").write_text(f"id,text\n1,{long}\n2,short\n")
    assert [document.text for document in read_documents(tmp_path / "a.csv")] == [long, "short"]
    with pytest.warns(UserWarning, match=r"a\.csv:2: longer than 200000 bytes"):
        documents = list(read_documents(tmp_path / "a.csv", bad_rows=BadRows("skip"), max_row_bytes=200_000))
    assert [document.text for document in documents] == ["short"]


def test_elements_are_those_of_the_whole_array_wherever_a_chunk_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(0)

    def value(depth: int) -> Any:
        kinds: list[Callable[[], Any]] = [
            lambda: "".join(draw.choice('a"\\[]{},: é\n') for _ in range(draw.randrange(8))),
            lambda: draw.choice([1, -2.5, True, None]),
        ]
        if depth:
            kinds += [
                lambda: [value(depth - 1) for _ in range(draw.randrange(3))],
                lambda: {str(value(0)): value(depth - 1) for _ in range(draw.randrange(3))},
            ]
        return draw.choice(kinds)()

    for _ in range(300):
        array = [value(3) for _ in range(draw.randrange(5))]
        content = json.dumps(array, ensure_ascii=draw.random() < 0.5, indent=draw.choice([None, 1])).encode()
        monkeypatch.setattr("quietstar.data.rows.CHUNK", draw.randrange(1, 9))
        rows = list(read_json_elements(io.BytesIO(content), "a", 0, 10_000))
        assert [json.loads(row.content or b"") for row in rows] == array


def test_a_long_element_is_passed_over(tmp_path: Path) -> None:
    rows = [{"text": "a"}, {"text": "b" * 500_000}, {"text": "c"}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    with pytest.warns(UserWarning, match=r"a\.json: element 2: longer than 1000 bytes"):
        documents = list(read_documents(tmp_path / "a.json", bad_rows=BadRows("skip"), max_row_bytes=1000))
    assert [(document.text, document.place) for document in documents] == [
        ("a", f"{tmp_path / 'a.json'}: element 1"),
        ("c", f"{tmp_path / 'a.json'}: element 3"),
    ]


def test_a_directory_says_what_it_leaves_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (
        "a.jsonl",
        "deep/er/b.json",
        "deep/c.JSONL",
        "README.md",
        ".hidden.jsonl",
        "x.png",
        "y.png",
        "noending",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}))
    assert [document.text for document in read_documents(tmp_path)] == ["a.jsonl", "deep/c.JSONL", "deep/er/b.json"]
    told = capsys.readouterr().err
    assert "read 3 file(s), left out 2 .png" in told and told.count("\n") == 1
    for word in ("1 README.md", "1 hidden", "1 without an ending"):
        assert word in told


def test_links_in_a_directory_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("words")
    (tmp_path / "circle").symlink_to(tmp_path)
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nothing")
    (tmp_path / "same.txt").symlink_to(tmp_path / "a.txt")
    assert [document.text for document in read_documents(tmp_path)] == ["words", "words"]
    told = capsys.readouterr().err
    assert "1 link to a directory" in told and "1 broken link" in told


@pytest.mark.parametrize("path", ["x" * 5000, "a\0b", "a.txt/b.txt", "no such", ""])
def test_a_path_that_cannot_be(tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("words")
    if not path:
        assert [document.text for document in read_documents(path)] == ["words"]
        return
    with pytest.raises(DataError, match=r"data\.path: .*(cannot be read|no such file)") as told:
        list(read_documents(path))
    assert len(str(told.value)) < 400 and "\0" not in str(told.value)


def test_splits_are_not_mixed_in_a_directory(tmp_path: Path) -> None:
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_text('{"text": "x"}')
    with pytest.raises(ConfigError, match=r"another split \(test\.jsonl\)"):
        list(read_documents(tmp_path))
    assert len(list(read_documents(tmp_path, pattern="train*"))) == 1
    assert len(list(read_documents(f"{tmp_path}/tr*"))) == 1


def test_a_parquet_file_with_nested_columns(tmp_path: Path) -> None:
    rows = [{"meta": {"text": "a", "n": 1}, "plain": "x"}, {"meta": {"text": "b", "n": 2}, "plain": "y"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert [document.text for document in read_documents(tmp_path / "a.parquet", "meta.text")] == ["a", "b"]
    assert [document.text for document in read_documents(tmp_path / "a.parquet", "plain")] == ["x", "y"]
    assert [record.fields["meta"]["n"] for record in read_records(tmp_path / "a.parquet")] == ["1", "2"]
    with pytest.raises(
        DataError, match=r"a\.parquet:1: has no field 'meta\.url' \(its fields: 'meta\.text', 'meta\.n'\)"
    ):
        list(read_documents(tmp_path / "a.parquet", "meta.url"))


def test_prompts_of_every_kind(tmp_path: Path) -> None:
    contents = {"a.txt": "x\ny\n", "a.jsonl": '{"prompt": "x"}\n\n{"prompt": "y"}', "a.csv": "prompt\nx\ny\n"}
    contents |= {"a.json": '[{"prompt": "x"}, {"prompt": "y"}]', "b.JSON": '{"prompt": "x"}\n{"prompt": "y"}'}
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
        assert [prompt.text for prompt in read_prompts((), str(tmp_path / name))] == ["x", "y"]
    (tmp_path / "c.txt").write_text('{"prompt": "x"}\n{"prompt": "y"}\n')
    with pytest.raises(DataError, match=r"c\.txt: holds JSON objects"):
        read_prompts((), str(tmp_path / "c.txt"))


def test_a_name_without_an_ending_says_nothing_against_rows(tmp_path: Path) -> None:
    (tmp_path / "corpus").write_text('{"text": "x"}\n{"text": "y"}\n')
    assert [document.text for document in read_documents(str(tmp_path / "corpus"), "text")] == ["x", "y"]


CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    "content",
    [
        '{"messages": [\n{"role": "user", "content": "a"},\n{"role": "assistant", "content": "b"}\n]}',
        '{"messages":\n[{"role": "user", "content": "a"},\n {"role": "assistant", "content": "b"}]}\n',
        '\n\n{\n"id":\n{"a": 1}\n,\n"messages": [\n{"role": "user", "content": "a"}\n,\n'
        '{"role": "assistant", "content": "b"}\n]\n}',
        '\ufeff{"id": "' + "x" * 100_000 + '",\n"messages": [\n{"role": "user", "content": "a"},\n'
        '{"role": "assistant", "content": "b"}\n]}',
        json.dumps({"id": "x" * 20_000, "messages": CHAT}, indent=1),
        json.dumps({"messages": CHAT, "id": 1}, indent=0),
        json.dumps({"messages": CHAT, "id": 1}),
        json.dumps({"id": "x" * 100_000, "messages": CHAT}),
        json.dumps([{"messages": CHAT}], indent=1),
    ],
)
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_one_value_may_have_any_line_breaks(tmp_path: Path, content: str, ending: str) -> None:
    """An object in which a message had a line of its own was taken for JSON lines, and refused."""
    pack = gzip.compress if ending else bytes
    (tmp_path / f"a.json{ending}").write_bytes(pack(content.encode()))
    assert json.loads(content.lstrip("\ufeff"))  # another reader takes it for one value
    documents = list(read_documents(tmp_path / f"a.json{ending}", "messages", render=repr))
    assert [document.text for document in documents] == [repr(CHAT)]


@pytest.mark.parametrize(
    "lines",
    [
        ['{"text": "a"}', '{"text": "b"}'],
        ["", '{"text": "a"}', " ", '{"text": "b"}', ""],
        ['{"text": "a"', '{"text": "a"}', '{"text": "b"}'],
        ['{"text": "a"}', "{", '{"text": "b"}'],
        ['{"text": "a", "more": "' + "x" * 100_000 + '"}', '{"text": "b"}'],
        ['\ufeff{"text": "a", "more": [{"text": "c"}]}', '{"text": "b"}', "torn"],
    ],
)
def test_lines_are_told_by_the_first_one(tmp_path: Path, lines: list[str]) -> None:
    (tmp_path / "a.json").write_text("\n".join(lines))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        documents = list(read_documents(tmp_path / "a.json", bad_rows=BadRows("skip")))
    places = [f"{tmp_path / 'a.json'}:{1 + index}" for index, line in enumerate(lines) if line.endswith("}")]
    assert [(document.text, document.place) for document in documents] == list(zip("ab", places, strict=True))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "array.json", "a.csv", "a.jsonl.gz"])
def test_a_row_may_be_as_long_as_its_option_says(tmp_path: Path, name: str) -> None:
    """JSON had a limit of its own: data.max_row_bytes of more than 32 MiB changed nothing."""
    text = "a" * (MAX_JSON_BYTES + 1000)
    row = json.dumps({"text": text})
    content = {"array.json": f"[{row}]", "a.csv": f"text\n{text}\n"}.get(name, row + "\n").encode()
    (tmp_path / name).write_bytes(gzip.compress(content, 1) if name.endswith(".gz") else content)
    documents = read_documents(tmp_path / name, max_row_bytes=len(content))
    assert [len(document.text) for document in documents] == [len(text)]
    with pytest.raises(DataError, match=f"longer than {len(text) - 1} bytes"):
        list(read_documents(tmp_path / name, max_row_bytes=len(text) - 1))
