"""Small models over single characters, made on the spot: for experiments that need no files."""

from __future__ import annotations

import math

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def character_tokenizer(symbols: str, end: str | None = None) -> PreTrainedTokenizerFast:
    """One token per character.

    Args:
        symbols: The characters; a token's id is its place.
        end: Name of an end-of-sequence token, which comes after them.
    """
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    if end is not None:
        vocabulary[end] = len(vocabulary)
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **({} if end is None else {"eos_token": end}))


def small_llama(
    seed: int,
    vocabulary: int,
    *,
    layers: int,
    hidden_size: int = 128,
    intermediate_size: int = 344,
    heads: int = 4,
    context: int = 256,
    end: int | None = None,
) -> LlamaForCausalLM:
    """A Llama with random weights.

    Args:
        seed: Of the weights.
        vocabulary: Tokens.
        layers: Of the decoder.
        hidden_size: Of the residual stream.
        intermediate_size: Of the feed-forward layers.
        heads: Of attention; they divide `hidden_size`.
        context: Longest text in tokens.
        end: Id of the end-of-sequence token.
    """
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=context,
        # Lines are short: with the usual 10,000 most of a head's frequencies hardly move over one, and whether the
        # running sums are learned at all then hangs on the seed.
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=None,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.5)
            elif name == "lm_head":
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.Linear):
                # What is written to the residual stream starts smaller, so that its size does not grow with depth.
                writes = name.endswith(("o_proj", "down_proj"))
                scale = math.sqrt(2 * layers) if writes else 1.0
                nn.init.normal_(module.weight, std=1 / math.sqrt(module.in_features) / scale)
    return model
