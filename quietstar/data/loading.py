"""From the data options to batches: opens the training texts and the held-out texts that a run is evaluated on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from quietstar.config.training import STREAMED_HOMES, DataOptions
from quietstar.data.batches import Batches, IndexedBatches
from quietstar.data.packing import (
    HELD_OUT_SEED,
    CroppedBatches,
    CroppedDocuments,
    PackedTexts,
    pack,
    read_cropped,
    split,
)
from quietstar.data.rows import TRAINING, BadRows, OptionNames
from quietstar.data.shards import Shard, find_shards
from quietstar.data.sources import Document, read_documents
from quietstar.data.stream import WHOLE_SHARD, Position, ShuffledRows, StreamedBatches, Text, TextStream, stack
from quietstar.data.tokenizer import ChatTemplate, tokenizer_fingerprint
from quietstar.errors import ConfigError, DataError


def load_batches(
    options: DataOptions,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    seed: int,
    held_out_texts: int,
) -> tuple[Batches, PackedTexts | None]:
    """Opens the files or the stream that the options name.

    Args:
        options: Data options: where the text is and how it becomes training texts.
        tokenizer: Tokenizer of the base model; any transformers tokenizer.
        batch_size: Number of texts per optimizer step.
        seed: Seed of the order of the texts.
        held_out_texts: Number of texts of a stream that are held out; for files `options` gives the share.

    Returns:
        The texts to train on and the held-out ones, if any.

    Raises:
        ConfigError: An option is missing, the tokenizer cannot do what it asks, or a library for it is not installed.
        DataError: A file cannot be read, or there is not enough text.
    """
    bad_rows = BadRows(options.on_bad_row, options.max_bad_rows)
    if options.source != "files":
        return _load_stream(options, tokenizer, bad_rows, batch_size, seed, held_out_texts)
    if options.packing == "crop":
        return _load_crops(options, tokenizer, bad_rows, batch_size, seed)
    train, held_out = load_texts(options, tokenizer, bad_rows)
    return IndexedBatches(
        train.tokens, batch_size, seed, train.attention_mask, bad_rows.count, special=bad_rows.special
    ), held_out


def load_texts(
    options: DataOptions, tokenizer: PreTrainedTokenizerBase, bad_rows: BadRows | None = None
) -> tuple[PackedTexts, PackedTexts | None]:
    """Reads, packs and splits files, for the packings `joined` and `separate`.

    Args:
        options: Data options: where the text is and how it becomes training texts.
        tokenizer: Tokenizer of the base model; any transformers tokenizer.
        bad_rows: Policy for rows that cannot be used; None takes the one of `options`.

    Returns:
        The texts to train on and the held-out ones, if any.

    Raises:
        ConfigError: `data.path` is missing, or the tokenizer cannot do what an option asks.
        DataError: A file cannot be read, or there is not enough text.
    """
    bad_rows = bad_rows or BadRows(options.on_bad_row, options.max_bad_rows)

    def packed(path: str) -> PackedTexts:
        return pack(
            _documents(path, options, tokenizer, bad_rows),
            tokenizer,
            options.length,
            options.append_eos,
            separate=options.packing == "separate",
            bad_rows=bad_rows,
            special=options.special_tokens == "parse",
        )

    train = packed(_path_of(options))
    if options.validation_path is None:
        return split(train, options.validation_fraction)
    return train, packed(options.validation_path)


def _documents(
    path: str, options: DataOptions, tokenizer: PreTrainedTokenizerBase, bad_rows: BadRows
) -> Iterator[Document]:
    return read_documents(
        path,
        options.field,
        bad_rows,
        options.max_row_bytes,
        pattern=options.shards if path == options.path else None,
        render=ChatTemplate(tokenizer, options.special_tokens == "parse"),
        names=TRAINING if path == options.path else OptionNames(path="data.validation_path"),
    )


def _load_crops(
    options: DataOptions, tokenizer: PreTrainedTokenizerBase, bad_rows: BadRows, batch_size: int, seed: int
) -> tuple[Batches, PackedTexts | None]:
    def cropped(path: str) -> CroppedDocuments:
        documents = _documents(path, options, tokenizer, bad_rows)
        special = options.special_tokens == "parse"
        return read_cropped(documents, tokenizer, options.length, options.append_eos, bad_rows, special)

    train = cropped(_path_of(options))
    if options.validation_path is not None:
        held_out: CroppedDocuments | None = cropped(options.validation_path)
    else:
        train, held_out = train.split(options.validation_fraction)
    batches = CroppedBatches(train, batch_size, seed, bad_rows.count, bad_rows.special)
    return batches, None if held_out is None else held_out.held_out()


def _load_stream(
    options: DataOptions,
    tokenizer: PreTrainedTokenizerBase,
    bad_rows: BadRows,
    batch_size: int,
    seed: int,
    held_out_texts: int,
) -> tuple[Batches, PackedTexts | None]:
    shards = find_shards(_home_of(options), options.shards, options.source)
    held_out, held_out_rows = None, [0] * len(shards)
    if options.validation_path is not None and held_out_texts:
        held_out_shards = find_shards(options.validation_path, None)
        held_out, _ = _first_texts(held_out_shards, options, tokenizer, bad_rows, held_out_texts)
    elif options.validation_fraction and held_out_texts:
        held_out, end = _first_texts(shards, options, tokenizer, bad_rows, held_out_texts)
        if len(held_out) < held_out_texts:
            raise DataError(
                f"{shards[0].path}: {len(shards)} shard(s) with {len(held_out)} text(s) of {options.length} tokens, of "
                f"which {held_out_texts} would be held out; give more text or a data.validation_path, or set "
                "data.validation_fraction to 0"
            )
        held_out_rows[: end.shard] = [WHOLE_SHARD] * end.shard
        held_out_rows[end.shard] = end.row
    rows = ShuffledRows(
        shards,
        options.field,
        options.max_row_bytes,
        seed=seed,
        window=options.shuffle_rows,
        held_out=held_out_rows,
    )
    texts = _text_stream(rows, options, tokenizer, bad_rows, seed, options.workers)
    fingerprint = _fingerprint(shards, options, tokenizer, seed, held_out_rows)
    return StreamedBatches(texts, batch_size, bad_rows, fingerprint), held_out


def _first_texts(
    shards: Sequence[Shard],
    options: DataOptions,
    tokenizer: PreTrainedTokenizerBase,
    bad_rows: BadRows,
    texts: int,
) -> tuple[PackedTexts, Position]:
    """Returns the first texts in the order of the shards, or all if there are fewer, and the row after their last."""
    rows = ShuffledRows(shards, options.field, options.max_row_bytes)
    stream = _text_stream(rows, options, tokenizer, bad_rows, HELD_OUT_SEED, workers=0)
    found: list[Text] = []
    end = Position()
    while len(found) < texts:
        text = stream.next()
        if stream.position.epoch:
            break  # the stream has started over
        found.append(text)
        end = stream.position.next() if stream.token else stream.position
    if not found:
        raise DataError(f"{shards[0].path}: less text than one text of {options.length} tokens to hold out")
    return stack(found), end


def _text_stream(
    rows: ShuffledRows,
    options: DataOptions,
    tokenizer: PreTrainedTokenizerBase,
    bad_rows: BadRows,
    seed: int,
    workers: int,
) -> TextStream:
    return TextStream(
        rows,
        tokenizer,
        field=options.field,
        length=options.length,
        packing=options.packing,
        append_eos=options.append_eos,
        seed=seed,
        bad_rows=bad_rows,
        workers=workers,
        special=options.special_tokens == "parse",
    )


def _fingerprint(
    shards: Sequence[Shard],
    options: DataOptions,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    held_out_rows: Sequence[int],
) -> dict[str, Any]:
    """Returns plain JSON values that identify the stream: cheaply, from shard names and sizes and the first row."""
    names = json.dumps([(shard.name, shard.size) for shard in shards])
    rows = (row for shard in shards for row in shard.rows(0, options.field, options.max_row_bytes))
    first = next(rows, None)
    # a run from before the option has no such key, and is one that parses
    special = {} if options.special_tokens == "parse" else {"special_tokens": options.special_tokens}
    return special | {
        "source": options.source,
        "shards": len(shards),
        "names_and_sizes": _sha256(names.encode()),
        "first_row": _sha256((first and first.content) or b""),
        "held_out_shards": held_out_rows.count(WHOLE_SHARD),
        "held_out_rows": sum(count for count in held_out_rows if count != WHOLE_SHARD),
        "field": options.field,
        "packing": options.packing,
        "length": options.length,
        "append_eos": options.append_eos,
        "shuffle_rows": options.shuffle_rows,
        "seed": seed,
        "tokenizer": tokenizer_fingerprint(tokenizer),
    }


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _home_of(options: DataOptions) -> str:
    path = options.path or STREAMED_HOMES.get(options.source)
    if path is None:
        raise ConfigError("data.path: missing; data.source stream needs a directory of shards or a hub dataset")
    return path


def _path_of(options: DataOptions) -> str:
    if options.path is None:
        raise ConfigError("data.path: missing; needs a file of text or rows, or a directory of them")
    return options.path
