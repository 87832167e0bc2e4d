"""Documents from the files of a disk, of any kind; everything wrong with a file is reported with its name and line.

`read_documents` reads training text. `read_text` and `encode` read a text and take its first tokens, for evaluation and
the page of thoughts.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from quietstar.config.training import DataOptions
from quietstar.data.rows import (
    TRAINING,
    BadRow,
    BadRows,
    Chat,
    OptionNames,
    Render,
    Row,
    Unit,
    text_of,
    unrendered,
)
from quietstar.data.shards import Shard, find_shards, is_local
from quietstar.data.tokenizer import ChatTemplate, SpecialTokens, joined
from quietstar.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


MAX_ROW_BYTES = 10_000_000

STANDARD_INPUT = "-"

NO_ROWS = "has no rows, needs at least one"

BETWEEN = "\n\n"
"""What stands between the documents of a text."""

TEXT_OPTIONS = OptionNames("text", "field", "special_tokens", "", "length", "checkpoint")
"""Names of the options of the commands that read a text for a model: `evaluate`, `gate` and `view`."""


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
    names: OptionNames = TRAINING,
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
        names: Names of the options that messages advise to change.

    Raises:
        DataError: The path cannot be read, or a file is not what its ending says. Raised through `bad_rows` also for a
            file or a document without text, bytes that are not UTF-8, a row that is not an object or is too long, and a
            field that is missing or holds no text. The message names file, line and reason.
    """
    bad_rows = bad_rows or BadRows()
    for shard in find_shards(os.fspath(path), pattern, "files", names.path):
        yield from _documents(shard, field, bad_rows, max_row_bytes, render, names)


def _documents(
    shard: Shard,
    field: str,
    bad_rows: BadRows,
    max_row_bytes: int,
    render: Render | None,
    names: OptionNames,
) -> Iterator[Document]:
    blank = True
    for row in shard.rows(0, field, max_row_bytes, names.field):
        try:
            text = text_of(row, field, render, names)
        except BadRow as error:
            blank = False
            bad_rows.report(place_of(row, error), str(error))
            continue
        if text is not None:
            blank = False
            yield Document(text, row.source, row.number if row.unit else None, row.unit or ":")
    if blank:
        bad_rows.report(shard.path, NO_ROWS)


def place_of(row: Row, error: BadRow) -> str:
    """Returns the place of a row that cannot be used; of a text file, the line."""
    return f"{row.source}:{error.line + 1}" if not row.unit and error.line else row.place


class DocumentsText(str):
    """The texts of documents with a blank line between, as `read_text` returns them.

    Attributes:
        documents: Documents; of a chat the tokenizer's template has yet to make the text.
        names: Names of the options that messages advise to change.
    """

    documents: tuple[Document, ...]
    names: OptionNames


def read_text(path: str | Path, field: str = "text", names: OptionNames = TEXT_OPTIONS) -> DocumentsText:
    """Reads a text file, with `\\n` for every kind of line break, or the texts of rows, with a blank line between.

    Args:
        path: File or directory to read, as in `read_documents`; `-` is standard input, which is read by its content.
        field: Field of a row that holds the text or a chat.
        names: Names of the options that messages advise to change.

    Raises:
        DataError: The path cannot be read, holds something else, or has no text in it.
    """
    if str(path) == STANDARD_INPUT:
        documents = tuple(_documents(standard_input(), field, BadRows(), MAX_ROW_BYTES, unrendered, names))
    else:
        documents = tuple(read_documents(path, field, render=unrendered, names=names))
    text = DocumentsText(BETWEEN.join(document.text for document in documents))
    text.documents, text.names = documents, names
    return text


def standard_input() -> Shard:
    """Returns standard input as a file whose kind its content says."""
    return Shard("standard input", "", 0, lambda: io.BytesIO(sys.stdin.buffer.read()))


def encode(
    text: str, tokenizer: PreTrainedTokenizerBase, most: int, name: str, special_tokens: str = "parse"
) -> tuple[list[int], bool]:
    """Encodes the beginning of a text without the tokens that a tokenizer puts around it, as in training.

    Args:
        text: Text whose first tokens are wanted, or what `read_text` has read.
        tokenizer: Tokenizer of the model.
        most: Largest number of tokens to return.
        name: Name of the text in error messages.
        special_tokens: Meaning of a special token's text, as `data.special_tokens`.

    Returns:
        The first token ids, at most `most`, and whether the text goes on after them.

    Raises:
        ConfigError: The tokenizer has no template for chats, or cannot read the text of a special token as characters.
        DataError: The tokenizer cannot encode the text, the template refuses a chat, or the text has fewer than two
            tokens.
    """
    if not text or text.isspace():
        raise DataError(f"{name}: has no text in it ({len(text)} characters, all white space)")
    names = text.names if isinstance(text, DocumentsText) else TEXT_OPTIONS
    rule = SpecialTokens(tokenizer, special_tokens == "parse", names.special_tokens)
    if isinstance(text, DocumentsText):
        template = ChatTemplate(tokenizer, rule.parse, names)
        text = joined([rendered(one.text, one.place, template) for one in text.documents], BETWEEN, rule)
    BadRows().found_special(name, rule.count(text), rule.means)
    try:
        ids = list(islice(chain.from_iterable(rule.ids(text)), most + 1))
    except BadRow as error:
        raise DataError(f"{name}: the model's tokenizer can't encode it: {error}") from error
    if len(ids) < 2:
        raise DataError(f"{name}: {len(ids)} token(s), needs at least 2 to have something to predict")
    return ids[:most], len(ids) > most


def rendered(text: str, place: str, template: ChatTemplate) -> str:
    """Returns a text, or the one that a template makes of a chat.

    Raises:
        ConfigError: The tokenizer has no chat template.
        DataError: The template refuses the chat.
    """
    if not isinstance(text, Chat):
        return text
    try:
        return template(text.messages)
    except BadRow as error:
        raise DataError(f"{place}: {error}") from None


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
