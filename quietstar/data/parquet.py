"""Rows of a parquet file: one column, row group by row group."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from quietstar.data.rows import Row, too_long
from quietstar.errors import ConfigError, DataError

ROWS_AT_ONCE = 256


def read_parquet_rows(file: BinaryIO, source: str, start: int, limit: int, column: str) -> Iterator[Row]:
    """The rows of a file from row `start` (from 0) on; row groups before it are not read.

    Args:
        file: An open file that can seek.
        source: Its name.
        start: The first row to give.
        limit: A row with more bytes of text becomes one without content.
        column: The column that holds the text.

    Raises:
        ConfigError: pyarrow is not installed.
        DataError: It is no parquet file, or has no such column of text.
    """
    arrow, parquet = _pyarrow()
    try:
        table = parquet.ParquetFile(file)
    except arrow.ArrowInvalid as error:
        raise DataError(f"{source}: not a whole parquet file: {error}") from error
    _check_column(table.schema_arrow, source, column, arrow)
    sizes = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
    first_rows = np.cumsum([0, *sizes])
    group = int(np.searchsorted(first_rows, start, side="right")) - 1
    if group == len(sizes):
        return
    index = int(first_rows[group])
    groups = range(group, len(sizes))
    for batch in table.iter_batches(ROWS_AT_ONCE, row_groups=groups, columns=[column], use_threads=False):
        for text in _bytes(batch.column(0), arrow):
            if index >= start:
                yield _row(text, source, index, limit, column)
            index += 1


def _row(text: bytes | None, source: str, index: int, limit: int, column: str) -> Row:
    if text is None:
        return Row(source, index, None, f"column {column!r} is null, needs a text", is_json=False)
    if len(text) > limit:
        return Row(source, index, None, too_long(limit), is_json=False)
    return Row(source, index, text, is_json=False)


def _bytes(values: Any, arrow: Any) -> list[bytes | None]:
    """Texts as they are stored: whether they are UTF-8 is looked at row by row."""
    if arrow.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    found: list[bytes | None] = values.cast(arrow.large_binary()).to_pylist()
    return found


def _check_column(schema: Any, source: str, column: str, arrow: Any) -> None:
    if column not in schema.names:
        columns = ", ".join(map(repr, schema.names[:10]))
        raise DataError(
            f"{source}: has no column {column!r} (its columns: {columns}); data.field names the one to read"
        )
    kind = schema.field(column).type
    text = kind.value_type if arrow.types.is_dictionary(kind) else kind
    if not (arrow.types.is_string(text) or arrow.types.is_large_string(text) or arrow.types.is_string_view(text)):
        raise DataError(f"{source}: column {column!r} holds {kind}, needs string")


def _pyarrow() -> tuple[Any, Any]:
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ConfigError(
            "data.source: parquet shards need pyarrow, which is not installed; pip install 'quietstar[data]'"
        ) from error
