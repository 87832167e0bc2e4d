"""What the sampling tests share."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.model.tiny import VOCABULARY

CHARACTERS = "".join(chr(ord("A") + index) for index in range(VOCABULARY - 3))


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """One token per character, with the special tokens of `tests.model.tiny`."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {text: 3 + index for index, text in enumerate(CHARACTERS)}
    made = Tokenizer(models.WordLevel(vocabulary))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
