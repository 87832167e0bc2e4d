"""A tokenizer that is missing, broken or of another model is refused by name."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import GPT2Config, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from quietstar.data.tokenizer import check_vocabulary, load_tokenizer, tokenizer_fingerprint
from quietstar.errors import ConfigError


def test_the_mistral_tokenizer_loads_offline(mistral_tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(mistral_tokenizer) == 32000
    assert mistral_tokenizer.tokenize("---") == ["▁---"]


def test_a_model_directory_without_a_tokenizer(tmp_path: Path) -> None:
    """transformers itself gives an empty tokenizer here, and training would go on with no text at all."""
    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=rf"model\.path: {tmp_path} has no tokenizer \(none of tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_damaged_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("garbage")
    with pytest.raises(
        ConfigError, match=rf"model\.path: the tokenizer of {tmp_path} cannot be loaded: Expecting value"
    ):
        load_tokenizer(tmp_path)


def test_a_path_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.path: .*nothing is not a directory"):
        load_tokenizer(tmp_path / "nothing")


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("x")
    with pytest.raises(ConfigError, match=r"model\.path: .*model\.gguf is not a directory"):
        load_tokenizer(tmp_path / "model.gguf")


def test_an_unknown_name_is_taken_as_a_hub_name() -> None:
    with pytest.raises(ConfigError, match=r"no directory of that name; taken as a hub name"):
        load_tokenizer("no-such-model-anywhere")


def test_code_beside_a_tokenizer_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.Evil", null]}}')
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    with pytest.raises(ConfigError, match="contains custom code"):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_larger_vocabulary_of_the_model_is_fine(mistral_tokenizer: PreTrainedTokenizerBase) -> None:
    check_vocabulary(mistral_tokenizer, 32000)
    check_vocabulary(mistral_tokenizer, 32002)


def test_a_smaller_vocabulary_of_the_model(mistral_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ConfigError, match=r"token ids up to 31999 \(.*\), but the model's vocabulary has 1000 entries"):
        check_vocabulary(mistral_tokenizer, 1000)


def test_a_fingerprint_is_that_of_the_tokens_and_not_of_the_last_call(
    tmp_path: Path, byte_tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer = copy.deepcopy(byte_tokenizer)
    first = tokenizer_fingerprint(tokenizer)
    assert first["vocabulary_size"] == len(tokenizer)
    tokenizer("a long text", truncation=True, max_length=2)
    assert tokenizer_fingerprint(tokenizer) == first
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(load_tokenizer(tmp_path)) == first
    tokenizer.add_tokens(["<thought>"])
    assert tokenizer_fingerprint(tokenizer) != first


def test_a_fingerprint_knows_the_merges_and_the_end_of_a_text(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    first = tokenizer_fingerprint(byte_tokenizer)
    assert first == tokenizer_fingerprint(copy.deepcopy(byte_tokenizer))
    other_end = copy.deepcopy(byte_tokenizer)
    other_end.eos_token = "a"
    parts = json.loads(byte_tokenizer.backend_tokenizer.to_str())
    parts["model"]["merges"].pop()  # the vocabulary stays
    other_merges = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(parts)), eos_token="<end>")
    assert other_merges.get_vocab() == byte_tokenizer.get_vocab()
    assert first not in (tokenizer_fingerprint(other_end), tokenizer_fingerprint(other_merges))
