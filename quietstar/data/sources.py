"""Documents from text and JSONL files on the disk; everything wrong with a file is reported with its name and line.

`read_documents` reads training text. `read_text` and `encode` read a single text file and take its first tokens, for
evaluation and the page of thoughts.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from quietstar.config.training import DataOptions
from quietstar.data.rows import BYTE_ORDER_MARK, BadRow, BadRows, decode, read_json_rows, text_of
from quietstar.data.shards import find_shards, is_local
from quietstar.data.tokenizer import token_ids
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
        line: Line of the document in a JSONL file, from 1; None for a text file, which is one document as a whole.
    """

    text: str
    source: str
    line: int | None = None

    @property
    def place(self) -> str:
        """`file` or `file:line`."""
        return self.source if self.line is None else f"{self.source}:{self.line}"


def read_documents(
    path: str | os.PathLike[str],
    field: str = "text",
    bad_rows: BadRows | None = None,
    max_row_bytes: int = MAX_ROW_BYTES,
) -> Iterator[Document]:
    """Reads the documents of a file, or of the `.txt` and `.jsonl` files of a directory in the order of their names.

    A `.jsonl` file holds one document per line; any other file is one document.

    Args:
        path: File or directory to read; directories inside a directory are not read.
        field: Field of a JSONL line that holds the text.
        bad_rows: Policy for text files and lines that cannot be used; None stops at the first.
        max_row_bytes: Most bytes of a JSONL line; longer lines cannot be used.

    Raises:
        DataError: The path cannot be read. Raised through `bad_rows` also for a file or a document without text, bytes
            that are not UTF-8, a line that is not a JSON object or is too long, and a field that is missing or is not
            a string. The message names file, line and reason.
    """
    bad_rows = bad_rows or BadRows()
    for file in document_files(path):
        try:
            if file.suffix == ".jsonl":
                yield from _read_jsonl(file, field, bad_rows, max_row_bytes)
            else:
                yield from _read_text(file, bad_rows)
        except OSError as error:
            raise DataError(f"{file}: cannot be read: {error.strerror}") from error


def document_files(path: str | os.PathLike[str], option: str = "") -> list[Path]:
    """Lists the files that `read_documents` reads. They may still be unreadable.

    Args:
        path: File, or directory of `.txt` and `.jsonl` files.
        option: Option that names the path, for the error message.

    Raises:
        DataError: There is no such file.
    """
    place = Path(path)
    named = f"{option}: {place}" if option else str(place)
    if place.is_dir():
        files = sorted(entry for entry in place.iterdir() if entry.suffix in (".txt", ".jsonl") and entry.is_file())
        if not files:
            raise DataError(f"{named}: the directory has no .txt or .jsonl file")
        return files
    if not place.exists():
        raise DataError(f"{named}: no such file or directory")
    return [place]


def _read_text(file: Path, bad_rows: BadRows) -> Iterator[Document]:
    content = file.read_bytes()
    if (zero := content.find(b"\0")) >= 0:
        bad_rows.report(str(file), f"not UTF-8 text: byte {zero} is zero; it is binary, or text in another encoding")
        return
    try:
        text = decode(content.removeprefix(BYTE_ORDER_MARK))
    except BadRow as error:
        bad_rows.report(f"{file}:{error.line + 1}", str(error))
        return
    if not text or text.isspace():
        bad_rows.report(str(file), _no_text(len(content)))
        return
    yield Document(text, str(file))


def _read_jsonl(file: Path, field: str, bad_rows: BadRows, max_row_bytes: int) -> Iterator[Document]:
    blank = True
    with file.open("rb") as lines:
        for row in read_json_rows(lines, str(file), 0, max_row_bytes):
            try:
                text = text_of(row, field)
            except BadRow as error:
                blank = False
                bad_rows.report(row.place, str(error))
                continue
            if text is not None:
                blank = False
                yield Document(text, str(file), row.index + 1)
    if blank:
        bad_rows.report(str(file), _no_text(file.stat().st_size))


def _no_text(size: int) -> str:
    return f"no text in it ({size} bytes, all white space)"


def read_text(path: str | Path) -> str:
    """Reads a text file, with `\\n` for every kind of line break.

    Args:
        path: File of UTF-8 text; `-` is standard input.

    Raises:
        DataError: The file cannot be read, is binary or in another encoding (the message gives the offset of the first
            such byte), or has no text in it.
    """
    name = "standard input" if str(path) == STANDARD_INPUT else str(path)
    try:
        content = sys.stdin.buffer.read() if str(path) == STANDARD_INPUT else Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"text: {name}: cannot be read: {error.strerror}") from error
    if (zero := content.find(b"\0")) >= 0:
        raise DataError(f"{name}: byte {zero} is zero; it is binary, or text in another encoding; needs UTF-8 text")
    mark = len(BYTE_ORDER_MARK) if content.startswith(BYTE_ORDER_MARK) else 0
    try:
        text = content[mark:].decode("utf-8")
    except UnicodeDecodeError as error:
        place = mark + error.start
        raise DataError(
            f"{name}: byte {place} (0x{content[place]:02x}) is not UTF-8: {error.reason}; needs UTF-8 text"
        ) from None
    check_text(text, name)
    return text.replace("\r\n", "\n").replace("\r", "\n")


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
            document_files(path, f"data.{option}")
        elif path is not None and is_local(path):
            find_shards(path, shards, options.source if option == "path" else "stream")
