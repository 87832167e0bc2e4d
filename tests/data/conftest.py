"""Real tokenizers without a network: Mistral's, from mistral-common, and a GPT-2-like one trained on the spot."""

from __future__ import annotations

import json
import shutil
from importlib.resources import as_file, files
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from quietstar.data.tokenizer import load_tokenizer

SENTENCES = "The cat's hat cost 12,345 dollars.\n\nIt   was red;\n\tand so on… naïve café 漢字 🦄!\n"


@pytest.fixture(scope="session")
def mistral_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mistral")
    with as_file(files("mistral_common") / "data" / "tokenizer.model.v1") as model:
        shutil.copy(model, directory / "tokenizer.model")
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture(scope="session")
def mistral_tokenizer(mistral_directory: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(mistral_directory)


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerBase:
    """Byte-level BPE with GPT-2's splitting rule, in which white space before a word waits for the word."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<end>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([SENTENCES * 20 + "\n\n\n    \n" * 20], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


ROWS = 60
"""Words that stand for a row in the texts of streams."""


@pytest.fixture(scope="session")
def word_tokenizer() -> PreTrainedTokenizerBase:
    """One token a word: `<end>` is 0, `a` is 1, `r0` is 2, `r1` is 3, ...; other words cannot be encoded."""
    words = ["<end>", "a", *(f"r{row}" for row in range(ROWS))]
    tokenizer = Tokenizer(models.WordLevel({word: token for token, word in enumerate(words)}, unk_token="<none>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
