"""Which tokens of an answer count, and what they are renormalised over, for tokenizers of all kinds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from quietstar.errors import ConfigError
from quietstar.evaluation.answers import load_format
from quietstar.evaluation.soft_accuracy import Allowed, symbols_of
from quietstar.evaluation.token_texts import encode, first_tokens, token_texts
from tests.evaluation.evaluated import tokenizer

DIGITS = load_format("gsm8k", None)
LETTERS = load_format("commonsenseqa", None)


def byte_level(merges: list[tuple[str, str]], symbols: str = "") -> PreTrainedTokenizerFast:
    """A tokenizer as GPT-2's, with these merges and, where it is given, no other symbols than `symbols`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet() if not symbols else set(symbols))
    vocabulary = {piece: place for place, piece in enumerate([*alphabet, *(a + b for a, b in merges)])}
    made = Tokenizer(models.BPE(vocabulary, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    common = pytest.importorskip("mistral_common", reason="it ships the tokenizer")
    directory = tmp_path_factory.mktemp("mistral")
    shutil.copy(Path(common.__file__).parent / "data" / "tokenizer.model.v1", directory / "tokenizer.model")
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return AutoTokenizer.from_pretrained(directory)


def test_renormalised_by_hand() -> None:
    """Of 1 (0.4), 2 (0.1), the line end (0.25) and x (0.25) only x is not allowed: 0.75 is left, so that 1 has
    0.4 / 0.75 = 8/15, 2 has 2/15 and the line end 1/3."""
    texts = {0: "1", 1: "2", 2: "\n", 3: "x"}
    allowed = Allowed(DIGITS, texts)
    logits = torch.tensor([0.4, 0.1, 0.25, 0.25]).log() + 7.0
    groups = torch.tensor([allowed.group[spelling] for spelling in ("1", "2", "\n")])
    found = allowed.log_probability(logits.expand(3, -1), groups).exp()
    assert found.tolist() == pytest.approx([8 / 15, 2 / 15, 1 / 3], rel=1e-6)


def test_tokens_that_spell_the_same_symbol_are_added_up() -> None:
    """`C` (0.2) and ` C` (0.3) against ` A` (0.1) and the line end (0.2): 0.5 of 0.8. ` CD` is no choice."""
    texts = {0: "C", 1: " C", 2: " A", 3: "\n", 4: " CD"}
    allowed = Allowed(LETTERS, texts)
    logits = torch.tensor([[0.2, 0.3, 0.1, 0.2, 0.2]]).log()
    found = allowed.log_probability(logits, torch.tensor([allowed.group["C"]]))
    assert float(found.exp()) == pytest.approx(0.5 / 0.8)


def test_the_authors_tokens_of_mistral(mistral: PreTrainedTokenizerBase) -> None:
    """The allowed ids that the released code lists for Mistral-7B are ours, and what we add spells the same symbols
    (byte tokens, and letters without a space before them)."""
    texts = token_texts(mistral)
    theirs = {
        DIGITS: [28740, 28750, 28770, 28781, 28782, 28784, 28787, 28783, 28774, 28734, 13],
        LETTERS: [330, 365, 334, 384, 413, 13],
    }
    for form, ids in theirs.items():
        allowed = Allowed(form, texts)
        assert set(ids) <= set(allowed.ids.tolist())
        assert len(allowed.group) == len(ids)
        assert {texts[token].strip(" ") for token in ids} == set(allowed.group)


def test_counted_tokens_of_mistral(mistral: PreTrainedTokenizerBase) -> None:
    texts = token_texts(mistral)
    number = Allowed(DIGITS, texts).find(mistral, "Q: What is 6 + 6?\nA:", "12", "here")
    assert [number.ids[position] for position in number.positions] == [28740, 28750, 13]  # not the lone space before
    letter = Allowed(LETTERS, texts).find(mistral, "Q: Where?\n(A) a\nA:", "C", "here")
    assert [letter.ids[position] for position in letter.positions] == [334, 13]


def test_signs_and_points_are_given_and_not_counted() -> None:
    own = tokenizer()
    found = Allowed(DIGITS, token_texts(own)).find(own, "Q: What?\nA:", "-2.5", "here")
    assert [own.decode([found.ids[position]]) for position in found.positions] == ["2", "5", "\n"]


def test_a_number_that_is_one_token_is_one_symbol() -> None:
    own = byte_level([("1", "2"), ("Ġ", "12")])
    texts = token_texts(own)
    allowed = Allowed(DIGITS, texts)
    found = allowed.find(own, "A:", "12", "here")
    assert [texts[found.ids[position]] for position in found.positions] == [" 12", "\n"]
    assert set(allowed.group) == {*"0123456789", "12", "\n"}
    assert symbols_of(allowed) == "11 symbols, some of several digits: not comparable with a tokenizer of single digits"
    assert symbols_of(Allowed(DIGITS, token_texts(tokenizer()))) == "10 symbols"


def test_an_answer_that_is_joined_with_something_else_is_refused() -> None:
    own = byte_level([("2", "Ċ")])
    with pytest.raises(ConfigError, match=r"writes the answer '12' of file:3 and a line end as .*'2\\n'"):
        Allowed(DIGITS, token_texts(own)).find(own, "A:", "12", "file:3")


@pytest.mark.parametrize(("symbols", "lacks"), [("Ċabc", "one of the answer's symbols"), ("0123", "a line end")])
def test_a_tokenizer_without_the_symbols_is_refused(symbols: str, lacks: str) -> None:
    with pytest.raises(ConfigError, match=lacks):
        Allowed(DIGITS, token_texts(byte_level([], symbols)))


def test_spaces_are_seen_where_decoding_drops_them(mistral: PreTrainedTokenizerBase) -> None:
    texts = token_texts(mistral)
    assert (texts[334], texts[28740], texts[13]) == (" C", "1", "\n")
    assert "".join(texts[token] for token in encode(mistral, "two words\n")).strip(" ") == "two words\n"


def test_a_text_begins_as_the_tokenizer_begins_one(mistral: PreTrainedTokenizerBase) -> None:
    mistral_ids = encode(mistral, "a")
    assert mistral_ids[: len(first_tokens(mistral, "a"))] == first_tokens(mistral, "a")
    assert len(mistral_ids) == len(first_tokens(mistral, "a")) + 1
    assert first_tokens(tokenizer(), "a") == []
