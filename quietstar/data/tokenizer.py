"""Tokenizers: loading and checking them, encoding texts as lists of token ids, and showing single tokens as text."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from quietstar.config.options import Bound, check_model_path, check_weights_format
from quietstar.data.rows import TRAINING, BadRow, Messages, OptionNames
from quietstar.errors import ConfigError, DataError
from quietstar.runs.directory import check_fields, check_model_directory, culprit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Without any of these transformers makes an empty tokenizer, silently, from a model's config.json alone.
_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab*", "*.model", "*.tiktoken")

_CONFIGURATIONS = ("tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class _TokenizerConfig:
    """The fields of a tokenizer's configuration whose types transformers does not check."""

    tokenizer_class: str | None = None
    model_max_length: Annotated[float, Bound("more than 0", lambda value: value > 0)] | None = None
    chat_template: str | list[dict[str, Any]] | dict[str, str] | None = None
    bos_token: str | dict[str, Any] | None = None
    eos_token: str | dict[str, Any] | None = None
    unk_token: str | dict[str, Any] | None = None
    pad_token: str | dict[str, Any] | None = None
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    add_prefix_space: bool | None = None
    clean_up_tokenization_spaces: bool | None = None
    split_special_tokens: bool | None = None
    padding_side: Literal["left", "right"] | None = None
    truncation_side: Literal["left", "right"] | None = None
    added_tokens_decoder: dict[str, dict[str, Any]] | None = None
    additional_special_tokens: list[Any] | None = None


PIECE = 50_000
"""Characters that are tokenised at once. It bounds the memory, which is a few hundred bytes per token."""

CONTEXT = 1_000
"""Characters of the neighbouring pieces that a piece is tokenised together with."""

_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")
_WORD_START = "\N{LOWER ONE EIGHTH BLOCK}"
_REPLACED = "\N{REPLACEMENT CHARACTER}"
_VISIBLE_BYTES = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHER_BYTES = [byte for byte in range(256) if byte not in _VISIBLE_BYTES]
_BYTE_OF = {chr(byte): byte for byte in _VISIBLE_BYTES} | {chr(256 + i): byte for i, byte in enumerate(_OTHER_BYTES)}
"""The alphabet of byte-level tokenizers: the byte that each character stands for."""


def load_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a model directory or hub name. Code from the directory or the hub is never run.

    Raises:
        ConfigError: There is no tokenizer, or it cannot be loaded.
    """
    check_tokenizer(path)
    check_model_directory(path)
    for name in _CONFIGURATIONS:
        if (Path(path) / name).is_file():
            check_fields(Path(path) / name, _TokenizerConfig)
    from transformers import AutoTokenizer, PreTrainedTokenizerBase  # slow: after the checks that do without them

    name = os.fspath(path)

    def load(place: str | os.PathLike[str]) -> Any:
        return AutoTokenizer.from_pretrained(os.fspath(place), trust_remote_code=False)

    try:
        tokenizer = load(name)
    except Exception as error:  # transformers and tokenizers raise many kinds, plain Exception among them
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        directory = Path(name)
        if directory.is_dir():
            found = culprit(directory, [*_CONFIGURATIONS, "config.json", "tokenizer.json"], error, load)
            if found is not None and found.startswith(os.fspath(directory / "config.json")):
                raise ConfigError(f"{found}, which its family can't use ({reason}); needs a value it can") from error
            if found is None and (directory / "tokenizer.json").is_file():
                found = os.fspath(directory / "tokenizer.json")
            if found is not None:
                reason += f"; the fault is in {found}; needs what transformers can use"
        kind = "" if Path(name).is_dir() else " (no directory of that name; taken as a hub name)"
        raise ConfigError(f"model.path: the tokenizer of {name}{kind} cannot be loaded: {reason}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ConfigError(f"model.path: {name} has a {type(tokenizer).__name__} where a tokenizer is needed")
    return tokenizer


def check_tokenizer(path: str | os.PathLike[str]) -> None:
    """Checks that there can be a tokenizer at a path, without asking the hub.

    Raises:
        ConfigError: The path is neither a directory nor a possible hub name, or the directory has no tokenizer's files.
    """
    check_model_path(path)
    directory = Path(path)
    if directory.is_dir() and not any(any(directory.glob(pattern)) for pattern in _VOCABULARY_FILES):
        check_weights_format(path)
        raise ConfigError(
            f"model.path: {os.fspath(path)} has no tokenizer (none of {', '.join(_VOCABULARY_FILES)}); "
            "put the files of the model's own tokenizer there"
        )


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Checks that the model has an embedding for each token. A model's vocabulary is often larger, which is fine.

    Raises:
        ConfigError: A token has no embedding; the message names the highest token id and the vocabulary size.
    """
    vocabulary = tokenizer.get_vocab()
    token = max(vocabulary, key=vocabulary.__getitem__)
    if vocabulary[token] >= vocab_size:
        raise ConfigError(
            f"model.path: the tokenizer has token ids up to {vocabulary[token]} ({token!r}), "
            f"but the model's vocabulary has {vocab_size} entries; tokenizer and model do not belong together"
        )


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Returns plain JSON values that are equal for tokenizers that encode texts equally.

    Returns:
        `sha256` of everything that decides how a text is encoded, as far as it is accessible (for a tokenizer written
        in Python only the vocabulary), and `vocabulary_size`.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = json.loads(backend.to_str()) if backend is not None else {"vocabulary": tokenizer.get_vocab()}
    for setting in ("truncation", "padding"):  # left over from the last call that asked for them
        parts.pop(setting, None)
    parts["eos"] = tokenizer.eos_token_id
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    return {"sha256": digest.hexdigest(), "vocabulary_size": len(tokenizer)}


def token_ids(text: str, tokenizer: PreTrainedTokenizerBase, special: bool = True) -> Iterator[list[int]]:
    """Tokenises a long text piece by piece, with the ids that the whole text would have.

    Args:
        text: Text to tokenise.
        tokenizer: Tokenizer of the model.
        special: Whether the text of a special token, such as `<|endoftext|>`, is this token rather than characters.

    A piece ends at a line break where it can, and is tokenised together with the ends of its neighbours: what a
    tokenizer does at the ends of a text (a space put in front, white space that joins the next word) then happens in
    the neighbours' characters. The neighbours' tokens are left out by their offsets. Tokenizers without offsets (those
    written in Python) get the whole text at once.
    """
    if not tokenizer.is_fast:
        yield tokenizer(text, add_special_tokens=False, split_special_tokens=not special, verbose=False)["input_ids"]
        return
    start = 0
    while start < len(text):
        limit = start + PIECE
        end = len(text)
        if limit < end:
            end = text.rfind("\n", start + PIECE // 2, limit) + 1 or limit
        origin = max(0, start - CONTEXT)
        encoded = tokenizer(
            text[origin : end + CONTEXT],
            add_special_tokens=False,
            split_special_tokens=not special,
            return_offsets_mapping=True,
            verbose=False,
        )
        first, beyond = (start - origin if start else -1), (end - origin if end < len(text) else len(text) + 1)
        yield [
            token
            for token, (place, _) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
            if first <= place < beyond
        ]
        start = end


def special_texts(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """Returns a pattern of the texts of the special tokens; None where the tokenizer has none."""
    known = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    known |= {str(token) for token in tokenizer.all_special_tokens}
    return re.compile("|".join(map(re.escape, sorted(known - {""}, key=len, reverse=True)))) if known - {""} else None


class ChatText(str):
    """The text of a chat. Its template's special tokens are tokens; those that the messages mention may be characters.

    Attributes:
        parts: Parts of the text, each with whether the texts of special tokens in it are these tokens.
        found: Number of texts of special tokens in the messages.
    """

    parts: tuple[tuple[str, bool], ...]
    found: int


class SpecialTokens:
    """Turns texts into token ids by one rule for the text of a special token, such as `<|endoftext|>`.

    Args:
        tokenizer: Tokenizer of the model.
        parse: Whether such a text is this token rather than characters; those of a chat's template always are.
        option: Option that says so, for messages.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, parse: bool = True, option: str = TRAINING.special_tokens
    ) -> None:
        self.tokenizer = tokenizer
        self.parse = parse
        self._option = option
        self._texts = special_texts(tokenizer)

    @property
    def means(self) -> str:
        """What becomes of the texts of special tokens, for a message."""
        if self.parse:
            return f"has the text of a special token, which becomes this token; {self._option} text prevents it"
        return f"has the text of a special token, which is read as characters ({self._option})"

    def count(self, text: str) -> int:
        """Returns how often a text has that of a special token; of a chat, how often its messages have."""
        if isinstance(text, ChatText):
            return text.found
        return len(self._texts.findall(text)) if self._texts else 0

    def ids(self, text: str) -> Iterator[list[int]]:
        """Yields the token ids of a text piece by piece, without those that a tokenizer puts around it, such as BOS.

        Raises:
            BadRow: The tokenizer cannot encode the text.
            ConfigError: The tokenizer cannot read the text of a special token as characters.
        """
        parts = text.parts if isinstance(text, ChatText) else ((text, self.parse),)
        for place, (part, parse) in enumerate(parts):
            pieces = token_ids(part, self.tokenizer, parse) if place == 0 else self._after(part, parse)
            try:
                for ids in pieces:
                    if not parse:
                        self.check_characters(part, ids)
                    yield ids
            except ConfigError:
                raise
            except Exception as error:  # tokenizers raises plain Exception, e.g. for a character that has no token
                raise BadRow(f"the tokenizer can't encode this text: {error}") from error

    def _after(self, part: str, parse: bool) -> Iterator[list[int]]:
        yield continued(self.tokenizer, part, parse)

    def check_characters(self, text: str, ids: Iterable[int]) -> None:
        """Refuses token ids that have a special token where the text of one should be characters.

        Raises:
            ConfigError: The tokenizer makes it this token in any case.
        """
        if self._texts is None or not self._texts.search(text):
            return
        known = set(self.tokenizer.all_special_ids) - {self.tokenizer.unk_token_id}
        for token in sorted(known.intersection(ids)):
            raise ConfigError(
                f"{self._option}: got text, but this tokenizer reads {self.tokenizer.convert_ids_to_tokens(token)!r} "
                "as the token in any case; needs parse, or a text without it"
            )


def joined(texts: Sequence[str], between: str, special: SpecialTokens) -> ChatText:
    """Returns texts, of which some may be those of chats, as one.

    Args:
        texts: Texts to join.
        between: Text between each two of them.
        special: Rule for the texts of special tokens outside the templates of chats.
    """
    parts: list[tuple[str, bool]] = []
    for place, text in enumerate(texts):
        own = text.parts if isinstance(text, ChatText) else ((text, special.parse),)
        for part, parse in ((between, special.parse), *own) if place else own:
            if parts and parts[-1][1] == parse:
                parts[-1] = (parts[-1][0] + part, parse)
            else:
                parts.append((part, parse))
    whole = ChatText("".join(part for part, _ in parts))
    whole.parts = tuple(parts)
    whole.found = sum(map(special.count, texts))
    return whole


class ChatTemplate:
    """Makes the text of a chat with the tokenizer's chat template.

    Args:
        tokenizer: Tokenizer of the model.
        special: Whether the text of a special token in a message is this token rather than characters.
        names: Names of the options that messages advise to change.
        answer: Whether the text ends where the model is to answer, or to go on with an answer that has begun.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        special: bool = True,
        names: OptionNames = TRAINING,
        answer: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._names = names
        self._answer = answer
        self._texts = special_texts(tokenizer)

    def __call__(self, messages: Messages) -> ChatText:
        """Returns the text of the chat.

        Raises:
            ConfigError: The tokenizer has no chat template.
            BadRow: The template refuses the messages.
        """
        if not self._tokenizer.chat_template:
            raise ConfigError(
                f"{self._names.field}: names chats, but the tokenizer of {self._names.tokenizer} has no chat template; "
                "needs a field with the text itself, or a tokenizer with a chat template"
            )
        contents = [message["content"] for message in messages]
        found = [text for content in contents if self._texts for text in self._texts.findall(content)]
        border = None
        if found and not self._special and self._texts:
            # a character that no message has marks where the text of a special token begins and ends
            border = next(chr(code) for code in range(0xE000, 0xF8FF) if not any(chr(code) in own for own in contents))
            messages = [
                {**message, "content": self._texts.sub(lambda own: f"{border}{own[0]}{border}", message["content"])}
                for message in messages
            ]
        try:
            begun = self._answer and messages[-1]["role"] == "assistant"
            rendered = self._tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=self._answer and not begun,
                continue_final_message=begun,
            )
        except Exception as error:  # of jinja2 and of the template itself
            from jinja2 import TemplateSyntaxError  # comes with transformers' chats

            reason = " ".join(str(error).split())[:300] or type(error).__name__
            if isinstance(error, TemplateSyntaxError):
                name = self._tokenizer.name_or_path
                raise ConfigError(f"model.path: the chat template of {name} is no Jinja template: {reason}") from None
            raise BadRow(f"the tokenizer's chat template refuses this chat: {reason}") from None
        pieces = str(rendered).split(border) if border else [str(rendered)]
        text = ChatText("".join(pieces))
        text.parts = tuple((piece, place % 2 == 0) for place, piece in enumerate(pieces) if piece)
        text.found = len(found)
        return text


def continued(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = True) -> list[int]:
    """Returns the token ids of a text that follows another: encoded after a line break, where none adds a space."""
    before, both, alone = (
        list(tokenizer(given, add_special_tokens=False, split_special_tokens=not special, verbose=False)["input_ids"])
        for given in ("\n", f"\n{text}", text)
    )
    return both[len(before) :] if both[: len(before)] == before else alone


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, special: SpecialTokens | None = None) -> list[int]:
    """Returns the token ids of a text that a model is to continue, with what the tokenizer puts before it, such as BOS.

    Args:
        tokenizer: Tokenizer of the model.
        prompt: Text to encode; a chat's template has put BOS before it already, where it belongs there.
        special: Rule for the texts of special tokens; None makes them these tokens.

    Raises:
        ConfigError: The tokenizer cannot read the text of a special token as characters.
        DataError: The tokenizer cannot encode the text: it has no token for a character.
    """
    special = special or SpecialTokens(tokenizer)
    try:
        if isinstance(prompt, ChatText):
            return list(chain.from_iterable(special.ids(prompt)))
        ids = list(tokenizer(prompt, split_special_tokens=not special.parse)["input_ids"])
        if not special.parse:
            bare = tokenizer(prompt, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            special.check_characters(prompt, bare)
    except ConfigError:
        raise
    except Exception as error:  # tokenizers raises plain Exception
        raise DataError(f"the tokenizer cannot encode {prompt[:80]!r}: {error}") from None
    if ids and ids[-1] == tokenizer.eos_token_id:  # some tokenizers end every text
        ids.pop()
    return ids


def tokenizer_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Returns the text of token ids, special tokens included and spaces as they are."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def vocabulary(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> dict[int, str | list[int]]:
    """Returns the text of each token by itself, spaces included; a list of bytes where it is not whole characters.

    Args:
        tokenizer: Tokenizer of the model; any transformers tokenizer.
        ids: Token ids to show; ids beyond the vocabulary of the tokenizer, which a model may have, become numbers.
    """
    return {token: _alone(tokenizer, token) for token in sorted(set(ids))}


def pieces(ids: Sequence[int], texts: dict[int, str | list[int]]) -> dict[int, str]:
    """Finds the characters that are spread over several tokens, by the index of the token that completes them.

    Args:
        ids: Token ids of a text.
        texts: Text or bytes of each token of `ids`, as `vocabulary` returns them.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    found = {}
    for index, token in enumerate(ids):
        text = texts[token]
        if isinstance(text, str):
            decoder.reset()
            continue
        added = decoder.decode(bytes(text))
        if _REPLACED in added:
            decoder.reset()
        elif added:
            found[index] = added
    return found


def _alone(tokenizer: PreTrainedTokenizerBase, token: int) -> str | list[int]:
    piece: Any = tokenizer.convert_ids_to_tokens(token) if token < len(tokenizer) else None
    if piece is None:
        return f"⟨{token}⟩"
    text = tokenizer_text(tokenizer, [token])
    if byte := _BYTE.fullmatch(piece):
        raw = bytes.fromhex(byte[1])
    elif _REPLACED in text and all(character in _BYTE_OF for character in piece):
        raw = bytes(_BYTE_OF[character] for character in piece)
    else:
        # alone, a tokenizer of words drops the space in front of the first one
        lost = piece.startswith(_WORD_START) and not text.startswith(" ")
        return (" " + text) if lost else text or piece
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return list(raw)
