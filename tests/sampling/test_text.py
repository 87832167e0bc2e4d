"""Completions as text, with tokenizers that drop spaces and split characters."""

from __future__ import annotations

import json
import shutil
from importlib.resources import as_file, files
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from quietstar.config.sampling import SamplingOptions
from quietstar.data.tokenizer import load_tokenizer
from quietstar.errors import ConfigError
from quietstar.model.loading import ending_tokens
from quietstar.sampling.requests import CompletionText
from quietstar.sampling.transformers_sampler import TransformersSampler
from tests.model.tiny import make_base


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    directory = tmp_path_factory.mktemp("mistral")
    with as_file(files("mistral_common") / "data" / "tokenizer.model.v1") as model:
        shutil.copy(model, directory / "tokenizer.model")
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def bytewise() -> PreTrainedTokenizerBase:
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"<end>": 0} | {symbol: 1 + i for i, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


COMPLETIONS = (" 12 apples . ", "12", "\n  Two\n\n", "ïve 漢字 🦄", " don 't")


@pytest.mark.parametrize("kind", ["mistral", "bytewise"])
@pytest.mark.parametrize("completion", COMPLETIONS)
def test_spaces_and_characters_survive(kind: str, completion: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    prompt = tokenizer("Q: how many?\nA:")["input_ids"]
    both = tokenizer("Q: how many?\nA:" + completion)["input_ids"]
    assert both[: len(prompt)] == prompt
    assert CompletionText(tokenizer).decode(prompt, both[len(prompt) :]) == (completion, False)


def test_special_tokens_are_no_text(mistral: Any) -> None:
    prompt = mistral("A:")["input_ids"]
    word = mistral("A: seven")["input_ids"][len(prompt) :]
    assert CompletionText(mistral).decode(prompt, [*word, mistral.bos_token_id, *word]) == (" seven seven", False)


def test_a_text_ends_before_its_first_stop_string(bytewise: Any) -> None:
    text = CompletionText(bytewise, ("\n\nQ:", "", "🦄"))
    prompt = bytewise("Q: 1+1\n\nQ: 2+2\nA:")["input_ids"]  # a stop string in the prompt is none of the completion's
    for completion, expected in ((" 4\n\nQ: 3🦄", " 4"), (" 4🦄\n\nQ:", " 4"), ("\n\nQ", "\n\nQ"), ("\n\nQ:", "")):
        tokens = bytewise(completion)["input_ids"]
        assert text.decode(prompt, tokens) == (expected, expected != completion)


@pytest.mark.parametrize("kind", ["mistral", "bytewise"])
def test_a_stop_string_is_seen_with_its_last_token(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    text = CompletionText(tokenizer, ("\n\nQ:", "🦄"))
    for before in ("", "one two three, four. " * 20):
        for stop in text.stop:
            tokens = tokenizer(before + stop)["input_ids"]
            seen = [text.has_stop(tokens[:count]) for count in range(len(tokens) + 1)]
            assert seen == [False] * len(tokens) + [True]
    assert not CompletionText(tokenizer).has_stop(tokens)


def test_ending_tokens_are_special(mistral: Any) -> None:
    def ends(*named: Any) -> list[int]:
        return ending_tokens(mistral, len(mistral), *(SimpleNamespace(eos_token_id=one) for one in named))

    assert ends() == ends(None) == ends([]) == [2]
    assert ends([2, 1]) == ends([1], 2) == ends((1,)) == [2, 1]
    assert ends(300) == ends([300, 301], 302) == [2]  # ordinary tokens, left from a default
    assert ends(-1) == ends(len(mistral)) == ends(True) == ends("1") == ends(1.0) == [2]  # no tokens at all


def test_a_tokenizer_without_an_end_ends_only_by_tokens_that_are_no_words() -> None:
    own = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))
    own.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    special = own.convert_tokens_to_ids("<|im_end|>")
    named = SimpleNamespace(eos_token_id=[0, special, 7, 9])
    assert ending_tokens(own, 9, named) == [special, 7]  # 7 has no text, 9 is beyond the model's vocabulary
    assert ending_tokens(own, 9, SimpleNamespace(eos_token_id=1), None) == []


def test_a_model_to_sample_from_needs_an_end() -> None:
    own = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        TransformersSampler(make_base(), own, SamplingOptions())
