"""Shards as OpenWebMath and C4 publish them, with rows that tell which one they are."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet


def row_text(row: int) -> str:
    """`r7 a a ...`: the number of the row, and 0 to 4 more words."""
    return " ".join([f"r{row}", *["a"] * (row * 7 % 5)])


def write_openwebmath(directory: Path, shards: Sequence[Sequence[str]], rows_in_group: int = 3) -> Path:
    """`data/train-00000-of-00002-<hash>.parquet`, with the columns url, text, date and metadata, all strings."""
    (directory / "data").mkdir(parents=True)
    for number, texts in enumerate(shards):
        table = pyarrow.table(
            {
                "url": pyarrow.array([f"https://example.org/{row}" for row in range(len(texts))], pyarrow.string()),
                "text": pyarrow.array(texts, pyarrow.string()),
                "date": pyarrow.array(["2023-03-22 05:07:00"] * len(texts), pyarrow.string()),
                "metadata": pyarrow.array(['{"extraction_info": {"found_math": true}}'] * len(texts), pyarrow.string()),
            }
        )
        name = f"train-{number:05}-of-{len(shards):05}-0123456789abcdef.parquet"
        pyarrow.parquet.write_table(table, directory / "data" / name, row_group_size=rows_in_group)
    return directory


def write_c4(directory: Path, shards: Sequence[Sequence[str]], split: str = "train") -> Path:
    """`en/c4-train.00000-of-00002.json.gz`, JSON lines with the fields text, timestamp and url."""
    (directory / "en").mkdir(parents=True, exist_ok=True)
    for number, texts in enumerate(shards):
        rows = [{"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "https://example.org"} for text in texts]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        name = f"c4-{split}.{number:05}-of-{len(shards):05}.json.gz"
        (directory / "en" / name).write_bytes(gzip.compress(lines.encode()))
    return directory
