"""Packing: the ids are those of the whole text, nothing is lost but the tail, and too little text is said plainly."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from quietstar.config.training import DataOptions
from quietstar.data import tokenizer as encoding
from quietstar.data.batches import BatchOrder, IndexedBatches
from quietstar.data.loading import load_batches, load_texts
from quietstar.data.packing import PackedTexts, pack, split
from quietstar.data.sources import Document
from quietstar.errors import ConfigError, DataError

PARTS = [
    "a",
    "The",
    " cat",
    "'s",
    "12",
    ",345",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    ".",
    "…",
    "é",
    "漢字",
    "🦄",
    "e\u0301",
    "▁",
]


def ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [token for piece in encoding.token_ids(text, tokenizer) for token in piece]


def whole(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.fixture(scope="session", params=["mistral_tokenizer", "byte_tokenizer"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return request.getfixturevalue(request.param)


@given(parts=st.lists(st.sampled_from(PARTS), min_size=1, max_size=120), piece=st.integers(5, 60))
def test_pieces_have_the_ids_of_the_whole_text(
    tokenizer: PreTrainedTokenizerBase, parts: list[str], piece: int
) -> None:
    text = "".join(parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "PIECE", piece)
        patch.setattr(encoding, "CONTEXT", 50)
        assert ids(text, tokenizer) == whole(text, tokenizer)


def test_a_long_text_is_tokenised_in_bounded_pieces_with_the_ids_of_the_whole(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    text = "The cat sat on the mat,\nand then it left.\n\n" * 4000 + "x" * 120_000
    pieces = list(encoding.token_ids(text, tokenizer))
    assert len(pieces) > 5
    assert max(map(len, pieces)) <= encoding.PIECE
    assert [token for piece in pieces for token in piece] == whole(text, tokenizer)


def test_blocks_are_the_joined_documents_cut(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    documents = [Document("The cat", "a"), Document("12,345 dollars", "b"), Document("naïve", "c")]
    joined: list[int] = []
    for document in documents:
        joined += [*whole(document.text, byte_tokenizer), byte_tokenizer.eos_token_id]
    packed = pack(documents, byte_tokenizer, length=4)
    assert packed.tokens.dtype == torch.int64
    assert packed.tokens.shape == (len(joined) // 4, 4) == (len(packed), packed.length)
    assert packed.tokens.flatten().tolist() == joined[: len(joined) // 4 * 4]


def test_without_eos_documents_follow_each_other_directly(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    packed = pack([Document("The", "a"), Document("cat", "b")], byte_tokenizer, length=1, append_eos=False)
    assert packed.tokens.flatten().tolist() == whole("The", byte_tokenizer) + whole("cat", byte_tokenizer)


def test_no_bos_in_the_middle_of_the_text(mistral_tokenizer: PreTrainedTokenizerBase) -> None:
    packed = pack([Document("one two", "a"), Document("three", "b")], mistral_tokenizer, length=1)
    assert mistral_tokenizer.bos_token_id not in packed.tokens.flatten().tolist()
    assert packed.tokens.flatten().tolist().count(mistral_tokenizer.eos_token_id) == 2


def test_too_little_text_says_how_much_there_is_and_how_much_is_needed(
    byte_tokenizer: PreTrainedTokenizerBase,
) -> None:
    count = len(whole("The cat", byte_tokenizer)) + 1
    with pytest.raises(DataError, match=rf"short\.txt: {count} tokens of text, needs at least 64 for one"):
        pack([Document("The cat", "short.txt")], byte_tokenizer, length=64)


def test_no_documents_at_all(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match="no document: 0 tokens of text"):
        pack([], byte_tokenizer, length=4)


def test_eos_is_asked_of_a_tokenizer_that_has_none() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(ConfigError, match=r"data\.append_eos: this tokenizer has no end-of-sequence token"):
        pack([Document("a", "a.txt")], tokenizer, length=1)
    assert len(pack([Document("a", "a.txt")], tokenizer, length=1, append_eos=False)) == 1


@pytest.mark.parametrize(("fraction", "held_out"), [(0.05, 1), (0.25, 5), (0.5, 10)])
def test_the_last_blocks_are_held_out(fraction: float, held_out: int) -> None:
    texts = PackedTexts(torch.arange(40).view(20, 2))
    train, validation = split(texts, fraction)
    assert validation is not None
    assert torch.equal(torch.cat([train.tokens, validation.tokens]), texts.tokens)
    assert len(validation) == held_out


def test_nothing_is_held_out_at_fraction_0() -> None:
    texts = PackedTexts(torch.arange(4).view(2, 2))
    assert split(texts, 0.0) == (texts, None)


def test_one_block_cannot_be_split() -> None:
    with pytest.raises(DataError, match=r"1 text\(s\) of 4 tokens, of which 1 would be held out"):
        split(PackedTexts(torch.arange(4).view(1, 4)), 0.05)


def test_options_name_the_texts(tmp_path: Path, byte_tokenizer: PreTrainedTokenizerBase) -> None:
    (tmp_path / "train.txt").write_text("The cat's hat\n" * 50)
    (tmp_path / "valid.jsonl").write_text('{"body": "The red cat was so naive"}\n')
    own = DataOptions(path=str(tmp_path / "train.txt"), length=8, validation_fraction=0.1)
    train, validation = load_texts(own, byte_tokenizer)
    assert validation is not None
    assert len(validation) == round(0.1 * (len(train) + len(validation)))
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "valid.jsonl").write_text('{"text": "The red cat was so naive"}\n')
    other = DataOptions(path=own.path, length=8, validation_path=str(tmp_path / "one"))
    all_train, given_validation = load_texts(other, byte_tokenizer)
    assert given_validation is not None
    assert len(all_train) == len(train) + len(validation)
    assert given_validation.tokens[0, :2].tolist() == whole("The red cat was so naive", byte_tokenizer)[:2]


def test_no_path(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ConfigError, match=r"data\.path: missing"):
        load_texts(DataOptions(), byte_tokenizer)


def test_separate_numbers_the_documents_of_each_block_from_1(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    documents = [Document(text, "a") for text in ("The cat", "12", "x" * 30, "a b")]
    sizes = [len(whole(document.text, byte_tokenizer)) + 1 for document in documents]
    packed = pack(documents, byte_tokenizer, length=7, separate=True)
    assert packed.attention_mask is not None
    assert packed.attention_mask.dtype == torch.int64
    owner = [number for number, size in enumerate(sizes) for _ in range(size)]
    for block, mask in enumerate(packed.attention_mask.tolist()):
        first = owner[block * 7]
        assert mask == [number - first + 1 for number in owner[block * 7 : block * 7 + 7]]
    plain = pack(documents, byte_tokenizer, length=7)
    assert plain.attention_mask is None
    assert torch.equal(plain.tokens, packed.tokens)


def test_held_out_blocks_keep_their_masks() -> None:
    mask = torch.arange(40, 80).view(20, 2)
    train, validation = split(PackedTexts(torch.arange(40).view(20, 2), mask), 0.25)
    assert validation is not None
    assert train.attention_mask is not None
    assert validation.attention_mask is not None
    assert torch.equal(torch.cat([train.attention_mask, validation.attention_mask]), mask)


@pytest.mark.parametrize("kind", ["joined", "separate"])
def test_batches_of_files_are_the_packed_texts_in_their_order(
    tmp_path: Path, byte_tokenizer: PreTrainedTokenizerBase, kind: Literal["joined", "separate"]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "The cat sat"}\n{}\n{"text": "and then it left."}\n' * 5)
    options = DataOptions(path=str(tmp_path), length=6, packing=kind, on_bad_row="skip")
    with pytest.warns(UserWarning, match=r"a\.jsonl:\d+: has no field 'text'"):
        train, held_out = load_texts(options, byte_tokenizer)
    with pytest.warns(UserWarning, match=r"a\.jsonl:\d+: has no field 'text'"):
        batches, same = load_batches(options, byte_tokenizer, batch_size=4, seed=3, held_out_texts=99)
    assert held_out is not None
    assert same is not None
    assert torch.equal(held_out.tokens, same.tokens)
    chosen = BatchOrder(len(train), 4, 3).indices(1)
    batch = batches.batch(2)
    assert torch.equal(batch.tokens, train.tokens[chosen])
    if kind == "separate":
        assert train.attention_mask is not None
        assert batch.attention_mask is not None
        assert torch.equal(batch.attention_mask, train.attention_mask[chosen])
    assert isinstance(batches, IndexedBatches)
    assert batches.skipped == 5


def test_one_bad_row_too_many_in_the_files(tmp_path: Path, byte_tokenizer: PreTrainedTokenizerBase) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "The cat sat"}\n{}\n' * 5)
    options = DataOptions(path=str(tmp_path), length=6, on_bad_row="skip", max_bad_rows=4)
    with pytest.warns(UserWarning), pytest.raises(DataError, match=r"5 rows cannot be used, more than .* \(4\)"):
        load_batches(options, byte_tokenizer, batch_size=4, seed=3, held_out_texts=0)
