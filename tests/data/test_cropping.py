"""Cropping: every place of a document, another one each epoch, the same in every run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from quietstar.config.training import DataOptions
from quietstar.data.loading import load_batches
from quietstar.data.packing import crop
from quietstar.errors import DataError
from tests.data.shard_files import row_text


@given(size=st.integers(0, 30), length=st.integers(1, 12), key=st.lists(st.integers(0, 2**70), max_size=4))
def test_a_crop_is_a_piece_or_the_whole_padded_on_the_right(size: int, length: int, key: list[int]) -> None:
    document = np.arange(100, 100 + size, dtype=np.int32)
    text, mask = crop(document, length, 7, *key)
    kept = min(size, length)
    assert mask.tolist() == [1] * kept + [0] * (length - kept)
    assert text[kept:].tolist() == [7] * (length - kept)
    if kept:
        assert text[:kept].tolist() == list(range(text[0], text[0] + kept))
    assert (crop(document, length, 7, *key)[0] == text).all()


def test_every_place_is_as_likely_as_another() -> None:
    """The bound is chi-square's 0.9999 quantile at 4 degrees of freedom."""
    document = np.arange(7, dtype=np.int32)
    starts = Counter(int(crop(document, 3, 0, 1, epoch, 5)[0][0]) for epoch in range(5_000))
    assert sorted(starts) == [0, 1, 2, 3, 4]
    assert sum((count - 1_000) ** 2 / 1_000 for count in starts.values()) < 23.6


def options(path: Path, **values: object) -> DataOptions:
    return DataOptions(path=str(path), packing="crop", **values)


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    return path


def test_each_document_once_per_epoch_and_a_new_piece_each_time(
    tmp_path: Path, word_tokenizer: PreTrainedTokenizerBase
) -> None:
    file = write(tmp_path / "rows.jsonl", [f"r{row} " * 40 for row in range(8)] + [" ".join(["a"] * 20 + ["r9"] * 20)])
    batches, held_out = load_batches(
        options(file, length=10, validation_fraction=0.1), word_tokenizer, batch_size=4, seed=3, held_out_texts=99
    )
    assert held_out is not None
    assert held_out.tokens.shape == (1, 10)
    epochs = [torch.cat([batches.batch(step).tokens for step in (2 * epoch + 1, 2 * epoch + 2)]) for epoch in range(2)]
    for epoch in epochs:
        assert sorted(epoch[:, 0].tolist()) == list(range(2, 10))
    again, _ = load_batches(
        options(file, length=10, validation_fraction=0.1), word_tokenizer, batch_size=4, seed=3, held_out_texts=0
    )
    batch = again.batch(4)
    assert torch.equal(batch.tokens, epochs[1][4:])
    assert batch.attention_mask is not None
    assert batch.attention_mask.min() == 1
    assert [name.rsplit(":", 1)[1] for name in batch.names] == [str(token - 1) for token in batch.tokens[:, 0].tolist()]


def test_pieces_move_from_epoch_to_epoch_and_the_held_out_ones_stay(
    tmp_path: Path, word_tokenizer: PreTrainedTokenizerBase
) -> None:
    words = " ".join(f"r{row}" for row in range(60))
    file = write(tmp_path / "rows.jsonl", [words] * 2)
    loaded = [
        load_batches(options(file, length=5, validation_fraction=0.5), word_tokenizer, batch_size=1, seed=seed,
                     held_out_texts=1)
        for seed in (1, 2)
    ]  # fmt: skip
    starts = [[int(batches.batch(step).tokens[0, 0]) for step in range(1, 9)] for batches, _ in loaded]
    assert len(set(starts[0])) > 4
    assert starts[0] != starts[1]
    assert loaded[0][1] is not None
    assert loaded[1][1] is not None
    assert torch.equal(loaded[0][1].tokens, loaded[1][1].tokens)


def test_short_documents_are_padded_with_eos_or_0_and_empty_ones_refused(
    tmp_path: Path, word_tokenizer: PreTrainedTokenizerBase
) -> None:
    file = write(tmp_path / "rows.jsonl", ["r5 r6"])
    chosen = options(file, length=5, validation_fraction=0.0)
    batch = load_batches(chosen, word_tokenizer, batch_size=1, seed=0, held_out_texts=0)[0].batch(1)
    assert batch.tokens.tolist() == [[7, 8, 0, 0, 0]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0, 0]]  # the document's own end is text, the padding is not
    backend = Tokenizer(models.WordLevel({"x": 0, "r5 r6": 3}, unk_token="x"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    chosen.append_eos = False
    with pytest.raises(DataError, match=r"rows\.jsonl:1: 1 token\(s\), needs at least 2"):
        load_batches(chosen, tokenizer, batch_size=1, seed=0, held_out_texts=0)
    chosen.on_bad_row = "skip"
    with (
        pytest.warns(UserWarning, match="needs at least 2"),
        pytest.raises(DataError, match=r"data\.path: no document that can be used \(1 rows could not be\)"),
    ):
        load_batches(chosen, tokenizer, batch_size=1, seed=0, held_out_texts=0)


def test_a_stream_is_cropped_by_position(tmp_path: Path, word_tokenizer: PreTrainedTokenizerBase) -> None:
    words = " ".join(f"r{row}" for row in range(60))
    write(tmp_path / "rows.jsonl", [words] * 3 + [row_text(4)])
    chosen = options(tmp_path, source="stream", length=7, validation_fraction=0.0, append_eos=False)
    batches, _ = load_batches(chosen, word_tokenizer, batch_size=4, seed=5, held_out_texts=0)
    first, second = batches.batch(1), batches.batch(2)
    assert first.attention_mask is not None
    assert sorted(first.attention_mask.sum(1).tolist()) == [4, 7, 7, 7]
    assert len(set(torch.cat([first.tokens, second.tokens])[:, 0].tolist())) > 4
