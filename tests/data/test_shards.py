"""Shards: which files a source reads, and what is said when one of them cannot be read."""

from __future__ import annotations

import gzip
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from quietstar.config.training import STREAMED_HOMES, DataOptions
from quietstar.data import shards
from quietstar.data.loading import load_batches
from quietstar.data.rows import BadRow, text_of
from quietstar.data.shards import PATTERNS, Shard, find_shards, list_shards
from quietstar.errors import ConfigError, DataError
from tests.data.shard_files import write_c4, write_openwebmath


def touch(directory: Path, names: Sequence[str]) -> None:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(b"x")


def names(found: list[Shard]) -> list[str]:
    return [shard.name for shard in found]


HUB = {
    "openwebmath": (
        ["data/train-00000-of-00114-5a023365406eb5c8.parquet", "data/train-00113-of-00114-8ba27aa9b4d4a1a5.parquet"],
        ["README.md", ".gitattributes"],
    ),
    "c4": (
        ["en/c4-train.00000-of-01024.json.gz", "en/c4-train.01023-of-01024.json.gz"],
        [
            "en/c4-validation.00000-of-00008.json.gz",
            "en.noblocklist/c4-train.00000-of-01024.json.gz",
            "realnewslike/c4-train.00000-of-00512.json.gz",
            "multilingual/c4-af.tfrecord-00000-of-00064.json.gz",
            "README.md",
        ],
    ),
}


@pytest.mark.parametrize("source", HUB)
def test_a_source_reads_the_right_files_of_its_home(source: str) -> None:
    """In a file system of the kind that the hub's is, with names as they are there."""
    filesystem = fsspec.filesystem("memory")
    root = f"/datasets/{STREAMED_HOMES[source]}"
    wanted, others = HUB[source]
    for name in wanted + others:
        filesystem.pipe(f"{root}/{name}", name.encode())
    found = list_shards(filesystem, f"{root}/{PATTERNS[source]}", root)
    assert sorted(names(found)) == wanted
    assert [shard.size for shard in found] == [len(shard.name) for shard in found]
    with found[0].open() as file:
        assert file.read() == found[0].name.encode()


@pytest.mark.parametrize(("path", "source"), [(STREAMED_HOMES["c4"], "c4"), ("owner/name@branch/de", "stream")])
def test_what_is_no_directory_is_a_dataset_of_the_hub(path: str, source: str) -> None:
    with pytest.raises(DataError, match=rf"data\.path: {path}: no such directory; as a dataset of the hub .* offline"):
        find_shards(path, None, source)


@pytest.mark.parametrize("path", ["./data", "~/data", "/no/such/data"])
def test_what_can_only_be_a_directory_is_not_asked_of_the_hub(path: str) -> None:
    with pytest.raises(DataError, match=r"data\.path: .*data: no such file or directory"):
        find_shards(path, None)


def test_a_directory_gives_its_shards_in_the_order_of_their_names(tmp_path: Path) -> None:
    touch(tmp_path, ["b.jsonl", "a.parquet", "sub/c.json.gz", "sub/d.jsonl.gz"])
    touch(tmp_path, ["readme.md", "dataset_info.json", ".cache/huggingface/e.jsonl", "f.csv"])
    everything = ["a.parquet", "b.jsonl", "f.csv", "sub/c.json.gz", "sub/d.jsonl.gz"]
    assert names(find_shards(str(tmp_path), None)) == everything
    assert names(find_shards(str(tmp_path), "*.json")) == ["dataset_info.json"]
    assert names(find_shards(str(tmp_path / "b.jsonl"), None)) == ["b.jsonl"]
    assert names(find_shards(str(tmp_path / "su*" / "*.gz"), None)) == ["sub/c.json.gz", "sub/d.jsonl.gz"]
    with pytest.raises(DataError, match=r"no file that can be read matches 'x\*'; .*data\.shards names those to read"):
        find_shards(str(tmp_path), "x*")


def test_a_copy_of_some_shards_needs_no_directories_of_the_dataset(tmp_path: Path) -> None:
    touch(tmp_path, ["c4-train.00007-of-01024.json.gz", "c4-validation.00000-of-00008.json.gz"])
    assert names(find_shards(str(tmp_path), None, "c4")) == ["c4-train.00007-of-01024.json.gz"]


def test_shards_of_several_splits_are_not_mixed(tmp_path: Path) -> None:
    touch(tmp_path, ["train-0.parquet", "test-0.parquet"])
    with pytest.raises(ConfigError, match=r"data\.shards: missing; .* another split \(test-0\.parquet\)"):
        find_shards(str(tmp_path), None)
    assert names(find_shards(str(tmp_path), "**/train*")) == ["train-0.parquet"]
    (tmp_path / "train-0.parquet").unlink()
    assert names(find_shards(str(tmp_path), None)) == ["test-0.parquet"]
    touch(tmp_path, ["contest.jsonl", "latest.jsonl"])
    (tmp_path / "test-0.parquet").unlink()
    assert len(find_shards(str(tmp_path), None)) == 2


@given(sizes=st.integers(0, 12), group=st.integers(1, 5), start=st.integers(0, 14))
def test_parquet_rows_from_any_row_on(
    sizes: int, group: int, start: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    texts = [f"text {row}" for row in range(sizes)]
    directory = write_openwebmath(tmp_path_factory.mktemp("shards"), [texts], rows_in_group=group)
    shard = find_shards(str(directory), None, "openwebmath")[0]
    rows = list(shard.rows(start, "text", 1_000))
    assert [row.index for row in rows] == list(range(sizes))[start:]
    assert [text_of(row, "text") for row in rows] == texts[start:]


def test_parquet_skips_row_groups_without_reading_them(tmp_path: Path) -> None:
    directory = write_openwebmath(tmp_path, [["x" * 1_000 + str(row) for row in range(64)]], rows_in_group=8)
    shard = find_shards(str(directory), None, "openwebmath")[0]
    read: list[int] = []

    class Counted(io.FileIO):
        def readinto(self, buffer: Any) -> int:
            read.append(self.tell())
            return super().readinto(buffer)

        def read(self, size: int | None = -1) -> bytes:
            read.append(self.tell())
            return super().read(-1 if size is None else size)

    counted = Shard(shard.path, shard.name, shard.size, lambda: Counted(shard.path))
    assert next(iter(counted.rows(60, "text", 10_000))).index == 60
    metadata = pyarrow.parquet.read_metadata(shard.path)
    begins = [metadata.row_group(group).column(1).dictionary_page_offset for group in range(8)]
    assert not any(begins[0] <= place < begins[7] for place in read)


@pytest.mark.parametrize(
    "kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())]
)
def test_columns_of_text_of_every_kind(tmp_path: Path, kind: Any) -> None:
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(["é\r\n", "b"]).cast(kind)}), file)
    rows = find_shards(str(file), None)[0].rows(0, "text", 1_000)
    assert [text_of(row, "text") for row in rows] == ["é\n", "b"]


def test_parquet_rows_that_cannot_be_used(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    content = pyarrow.array([b"fine", None, b" ", b"caf\xe9", b"x" * 101], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": content}), file)
    said = []
    for row in find_shards(str(file), None)[0].rows(0, "text", 100):
        try:
            text_of(row, "text")
        except BadRow as error:
            said.append((row.place.rsplit(":", 1)[1], str(error)))
    assert said == [
        ("2", "column 'text' is null, needs a text"),
        ("3", "column 'text' has no text in it"),
        ("4", "not UTF-8 text: unexpected end of data, 0xe9 at byte 4 of the line"),
        ("5", "longer than 100 bytes (data.max_row_bytes)"),
    ]


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda file: file.write_bytes(b"not parquet at all"), "not a whole parquet file"),
        (lambda file: file.write_bytes(b""), "not a whole parquet file"),
        (
            lambda file: pyarrow.parquet.write_table(pyarrow.table({"body": ["a"], "url": ["b"]}), file),
            r"no column 'text' \(its columns: 'body', 'url'\); data\.field names the one to read",
        ),
        (lambda file: pyarrow.parquet.write_table(pyarrow.table({"text": [3]}), file), "holds int64, needs string"),
        (
            lambda file: pyarrow.parquet.write_table(pyarrow.table({"text": [["a"]]}), file),
            r"column 'text' holds list<.*>, needs string",
        ),
    ],
)
def test_a_parquet_file_that_cannot_be_used(tmp_path: Path, write: Any, message: str) -> None:
    file = tmp_path / "a.parquet"
    write(file)
    with pytest.raises(DataError, match=rf"a\.parquet: .*{message}"):
        list(find_shards(str(file), None)[0].rows(0, "text", 100))


def test_a_truncated_gzip_file_says_up_to_where_it_could_be_read(tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"{row} {row * 7919 % 10007}"}) for row in range(5_000)]
    content = gzip.compress("\n".join(rows).encode())
    file = tmp_path / "a.json.gz"
    file.write_bytes(content[: len(content) // 2])
    found = []
    with pytest.raises(DataError, match=r"a\.json\.gz: cannot be read from row \d+ on: Compressed file ended before"):
        for row in find_shards(str(file), None)[0].rows(0, "text", 100):
            found.append(row.index)
    assert len(found) > 1_000


class Failing(io.BytesIO):
    """A connection that breaks off after some bytes."""

    def __init__(self, content: bytes, allowed: int) -> None:
        super().__init__(content)
        self.allowed = allowed

    def readline(self, size: int | None = -1) -> bytes:
        if self.tell() > self.allowed:
            raise ConnectionError("connection reset by peer")
        return super().readline(size)


def test_a_broken_connection_is_opened_again_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"".join(b'{"text": "row %d"}\n' % row for row in range(30))
    allowed = iter([100, 100, 250, 250, 10_000])
    waits: list[float] = []
    monkeypatch.setattr(shards.time, "sleep", waits.append)
    shard = Shard("hub/a.jsonl", "a.jsonl", len(content), lambda: Failing(content, next(allowed)), retries=2)
    assert [text_of(row, "text") for row in shard.rows(2, "text", 100)] == [f"row {row}" for row in range(2, 30)]
    assert waits == [2, 4, 2, 4]  # a row that comes through begins the count anew
    allowed = iter([100] * 9)
    with pytest.raises(DataError, match=r"hub/a\.jsonl: cannot be read from row 7 on: connection reset by peer"):
        list(shard.rows(0, "text", 100))


def test_a_shard_that_goes_away_is_named(tmp_path: Path, word_tokenizer: PreTrainedTokenizerBase) -> None:
    write_c4(tmp_path, [["r1 a"], ["r2 a"]])
    options = DataOptions(source="c4", path=str(tmp_path), length=4, shuffle_rows=1)
    batches, _ = load_batches(options, word_tokenizer, batch_size=1, seed=0, held_out_texts=0)
    (tmp_path / "en" / "c4-train.00001-of-00002.json.gz").unlink()
    with pytest.raises(DataError, match=r"c4-train\.00001-of-00002\.json\.gz: cannot be read from row 1 on"):
        batches.batch(1)


def test_without_pyarrow_parquet_says_what_to_install_and_json_lines_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    math = find_shards(str(write_openwebmath(tmp_path / "math", [["a"]])), None, "openwebmath")
    c4 = find_shards(str(write_c4(tmp_path / "c4", [["a"]])), None, "c4")
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # to an import it is then not installed
    assert len(list(c4[0].rows(0, "text", 100))) == 1
    with pytest.raises(ConfigError, match=r"parquet shards need pyarrow, .*; pip install 'quietstar\[data\]'"):
        list(math[0].rows(0, "text", 100))
