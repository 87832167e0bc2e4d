"""Documents from the files of a disk, of any kind; everything wrong with a file is reported with its name and line.

`read_documents` reads training text. `read_text` and `encode` read a text and take its first tokens, for evaluation and
the page of thoughts.
"""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from quietstar.config.training import DataOptions
from quietstar.data.rows import BadRow, BadRows, Render, Row, Unit, no_text, text_of
from quietstar.data.shards import Shard, find_shards, is_local
from quietstar.data.tokenizer import special_texts, token_ids
from quietstar.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


MAX_ROW_BYTES = 10_000_000

STANDARD_INPUT = "-"


@dataclass(frozen=True)
class Document:
    """One document of a file.

    Args:
        text: Text of the document; line breaks are `\\n` whatever they were in the file.
        source: File that the document comes from.
        line: Line of the document, or number of the element of an array, from 1; None for a text file, which is one
            document as a whole.
        unit: What the document is in its file.
    """

    text: str
    source: str
    line: int | None = None
    unit: Unit = ":"

    @property
    def place(self) -> str:
        """`file`, `file:line`, or `file: element n`."""
        return self.source if self.line is None else f"{self.source}{self.unit}{self.line}"


def read_documents(
    path: str | os.PathLike[str],
    field: str = "text",
    bad_rows: BadRows | None = None,
    max_row_bytes: int = MAX_ROW_BYTES,
    *,
    pattern: str | None = None,
    render: Render | None = None,
    option: str = "data.path",
) -> Iterator[Document]:
    """Reads the documents of a file, or of the files of a directory and those inside it in the order of their names.

    A text file is one document; other files hold a document in each row. `quietstar.data.kinds` has the kinds.

    Args:
        path: File or directory to read. What is left out of a directory is told on standard error.
        field: Field of a row that holds the text or a chat.
        bad_rows: Policy for text files and rows that cannot be used; None stops at the first.
        max_row_bytes: Most bytes of a row; longer rows cannot be used.
        pattern: Pattern of the files' names below a directory; None takes all.
        render: Function that makes the text of a chat; None refuses chats.
        option: Option that names the path, for messages.

    Raises:
        DataError: The path cannot be read, or a file is not what its ending says. Raised through `bad_rows` also for a
            file or a document without text, bytes that are not UTF-8, a row that is not an object or is too long, and a
            field that is missing or holds no text. The message names file, line and reason.
    """
    bad_rows = bad_rows or BadRows()
    for shard in find_shards(os.fspath(path), pattern, "files", option):
        yield from _documents(shard, field, bad_rows, max_row_bytes, render)


def _documents(
    shard: Shard, field: str, bad_rows: BadRows, max_row_bytes: int, render: Render | None
) -> Iterator[Document]:
    blank = True
    for row in shard.rows(0, field, max_row_bytes):
        try:
            text = text_of(row, field, render)
        except BadRow as error:
            blank = False
            bad_rows.report(place_of(row, error), str(error))
            continue
        if text is not None:
            blank = False
            yield Document(text, row.source, row.number if row.unit else None, row.unit or ":")
    if blank:
        bad_rows.report(shard.path, no_text(shard.size))


def place_of(row: Row, error: BadRow) -> str:
    """Returns the place of a row that cannot be used; of a text file, the line."""
    return f"{row.source}:{error.line + 1}" if not row.unit and error.line else row.place


def read_text(path: str | Path, field: str = "text") -> str:
    """Reads a text file, with `\\n` for every kind of line break, or the texts of rows, with a blank line between.

    Args:
        path: File or directory to read, as in `read_documents`; `-` is standard input, which is UTF-8 text.
        field: Field of a row that holds the text.

    Raises:
        DataError: The path cannot be read, holds something else, or has no text in it.
    """
    if str(path) != STANDARD_INPUT:
        return "\n\n".join(document.text for document in read_documents(path, field, option="text"))
    shard = Shard("standard input", "stdin.txt", 0, lambda: io.BytesIO(sys.stdin.buffer.read()))
    return next(_documents(shard, field, BadRows(), MAX_ROW_BYTES, None)).text


def check_text(text: str, name: str) -> None:
    """Raises `DataError` for a text of nothing but white space."""
    if not text or text.isspace():
        raise DataError(f"{name}: has no text in it ({len(text)} characters, all white space)")


def encode(text: str, tokenizer: PreTrainedTokenizerBase, most: int, name: str) -> tuple[list[int], bool]:
    """Encodes the beginning of a text without special tokens, as in training.

    Args:
        text: Text whose first tokens are wanted.
        tokenizer: Tokenizer of the model.
        most: Largest number of tokens to return.
        name: Name of the text in error messages.

    Returns:
        The first token ids, at most `most`, and whether the text goes on after them.

    Raises:
        DataError: The tokenizer cannot encode the text, or the text has fewer than two tokens.
    """
    check_text(text, name)
    known = special_texts(tokenizer)
    if known and (times := len(known.findall(text))):
        warnings.warn(
            f"{name}: has the text of a special token {times} time(s), which becomes this token", stacklevel=2
        )
    try:
        ids = list(islice(chain.from_iterable(token_ids(text, tokenizer)), most + 1))
    except Exception as error:  # tokenizers raises plain Exception, e.g. for a character that has no token
        raise DataError(f"{name}: the model's tokenizer can't encode it: {error}") from error
    if len(ids) < 2:
        raise DataError(f"{name}: {len(ids)} token(s), needs at least 2 to have something to predict")
    return ids[:most], len(ids) > most


def check_training_text(options: DataOptions) -> None:
    """Finds what can be wrong with the training text before torch is imported, which takes seconds.

    Args:
        options: Options of the training text; a hub dataset is not looked at.

    Raises:
        ConfigError, DataError: There is no such text, or no shard of the pattern.
    """
    for option, shards in (("path", options.shards), ("validation_path", None)):
        path = getattr(options, option)
        if path is not None and options.source == "files":
            find_shards(path, shards, "files", f"data.{option}", quiet=True)
        elif path is not None and is_local(path):
            find_shards(path, shards, options.source if option == "path" else "stream", f"data.{option}", quiet=True)
