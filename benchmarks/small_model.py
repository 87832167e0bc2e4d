"""A small Llama from scratch and a tokenizer of the text that it is going to read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from quietstar.model.loading import small_llama


def save_small_model(
    directory: Path, texts: Sequence[str], vocabulary: int, **sizes: Any
) -> tuple[Any, PreTrainedTokenizerFast]:
    """Writes both to a directory, and returns them.

    Args:
        directory: May be missing.
        texts: Each digit of them becomes a token; of the rest, pairs of bytes that are frequent.
        vocabulary: Tokens, one of which ends a text.
        sizes: Of `small_llama`.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=["</s>"], initial_alphabet=alphabet)
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    model = small_llama(0, len(wrapped), **sizes, end=wrapped.eos_token_id)
    wrapped.save_pretrained(directory)
    model.save_pretrained(directory)
    return model, wrapped
