"""Shards of a stream, and how they are read."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

KINDS: dict[str, dict[str, Any]] = {
    "jsonl": {"data__packing": "joined", "data__workers": 0, "data__shuffle_rows": 1},
    "jsonl.gz": {"data__packing": "crop", "data__workers": 2, "data__shuffle_rows": 4},
    "parquet": {"data__packing": "separate", "data__workers": 2, "data__shuffle_rows": 4},
}


"""By the format of the shards."""


def stream_options(shards: Path, kind: str) -> dict[str, Any]:
    """The options of a run on `write_shards(shards)`."""
    return {"data__source": "stream", "data__path": shards / kind, "training__eval_every": 0} | KINDS[kind]


def write_shards(directory: Path) -> Path:
    """Three shards of 10 rows in each format: less text than a run reads, so that it begins again."""
    rng = random.Random(0)
    for kind in KINDS:
        (directory / kind).mkdir()
    for number in range(3):
        texts = ["".join(rng.choice("0123456+=,\n") for _ in range(rng.randint(6, 24))) + "=" for _ in range(10)]
        content = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (directory / "jsonl" / f"{number}.jsonl").write_text(content)
        (directory / "jsonl.gz" / f"{number}.jsonl.gz").write_bytes(gzip.compress(content.encode()))
        table = pyarrow.table({"text": pyarrow.array(texts, pyarrow.string())})
        pyarrow.parquet.write_table(table, directory / "parquet" / f"{number}.parquet", row_group_size=4)
    return directory
