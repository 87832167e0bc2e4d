"""The small model that reads the textbook: a Llama over 13 characters, made from scratch."""

from __future__ import annotations

from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from quietstar.model import from_scratch
from quietstar.textbook.corpus import SYMBOLS


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character of the textbook."""
    return from_scratch.character_tokenizer(SYMBOLS)


def character_model(seed: int) -> LlamaForCausalLM:
    """A Llama with 2 layers of 128, about 0.4 million parameters, fresh from `seed`."""
    return from_scratch.small_llama(seed, len(SYMBOLS), layers=2)
