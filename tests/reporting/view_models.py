"""Small thinking models for the thought viewer: of characters, and of words and bytes."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from quietstar import QuietStarForCausalLM
from quietstar.demos.textbook import character_tokenizer
from quietstar.model.loading import small_llama
from tests.model.tiny import randomize_thinking

WORDS = (
    "The old house stood on a hill, and in the evening the whole village could see the light in its windows. "
    "Nobody knew who lived there; people said that the owner had gone away years ago, and yet the light was there. "
) * 3
HOSTILE = (
    "</script><img src=x onerror=hacked=1> <!--<script>hacked=1</script> --> &lt;b&gt; \\u003c ${1}\n"
    "\tbidi \u202eevil\u202c \u2066x\u2069 \u200b\u2028\x07\x1b\ufeff, עברית 12 עם מספרים, العربية كاملة\n"
    "e\u0301 a\u0308\u0323, 日本語 🙂\U0001f468\u200d\U0001f469   three spaces \u00a0 end\n\n"
)
"""Markup, controls, bidi overrides, right-to-left, combining characters, characters of several bytes, white space."""


def of_characters(**options: Any) -> tuple[QuietStarForCausalLM, PreTrainedTokenizerFast]:
    """The characters of the embedded default, 13 of them."""
    tokenizer = character_tokenizer()
    return _thinking(len(tokenizer), tokenizer, **options), tokenizer


def of_words(**options: Any) -> tuple[QuietStarForCausalLM, PreTrainedTokenizerFast]:
    """A byte-level tokenizer that has learned some English words; all else are single bytes. The model has 3 more."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        [WORDS], trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    return _thinking(len(tokenizer) + 3, tokenizer, **options), tokenizer


def _thinking(vocabulary: int, tokenizer: PreTrainedTokenizerFast, **options: Any) -> QuietStarForCausalLM:
    base = small_llama(0, vocabulary, layers=1, hidden_size=32, intermediate_size=48)
    settings = {"thought_length": 3, "lookahead": 2, "thoughts_per_position": 2, "backend": "torch", **options}
    model = QuietStarForCausalLM.from_base(base, tokenizer, start_text="+", end_text=",", **settings)
    with torch.no_grad():
        model.base.get_output_embeddings().weight.mul_(15)  # a fresh head knows nothing; colours need differences
    randomize_thinking(model)
    return model.eval()
