"""A text file as it is, and the first of its tokens: what is evaluated, and what a page of thoughts is made of."""

from __future__ import annotations

import sys
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from quietstar.data.encoding import token_ids
from quietstar.data.rows import BYTE_ORDER_MARK
from quietstar.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STANDARD_INPUT = "-"


def read_text(path: str | Path) -> str:
    """A text file, with `\\n` for every kind of line break.

    Args:
        path: UTF-8 text; `-` is standard input.

    Raises:
        DataError: It cannot be read, is binary or in another encoding (with the offset of the first such byte), or has
            no text in it.
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
    """Raises DataError for a text without anything but white space."""
    if not text or text.isspace():
        raise DataError(f"{name}: has no text in it ({len(text)} characters, all white space)")


def encode(text: str, tokenizer: PreTrainedTokenizerBase, most: int, name: str) -> tuple[list[int], bool]:
    """The first token ids of a text, without special tokens, as in training; and whether it goes on after them.

    Raises:
        DataError: The tokenizer cannot encode it, or it is one token.
    """
    check_text(text, name)
    try:
        ids = list(islice(chain.from_iterable(token_ids(text, tokenizer)), most + 1))
    except Exception as error:  # tokenizers raises plain Exception, e.g. for a character that has no token
        raise DataError(f"{name}: the model's tokenizer can't encode it: {error}") from error
    if len(ids) < 2:
        raise DataError(f"{name}: {len(ids)} token(s), needs at least 2 to have something to predict")
    return ids[:most], len(ids) > most
