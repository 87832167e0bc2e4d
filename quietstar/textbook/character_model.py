"""The small model that reads the textbook: a Llama over 13 characters, made from scratch."""

from __future__ import annotations

import math

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from quietstar.textbook.corpus import SYMBOLS

HIDDEN_SIZE = 128
LAYERS = 2


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character of the textbook."""
    tokenizer = Tokenizer(models.WordLevel({symbol: index for index, symbol in enumerate(SYMBOLS)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def character_model(seed: int) -> LlamaForCausalLM:
    """A Llama with 2 layers of 128, about 0.4 million parameters, fresh from `seed`."""
    config = LlamaConfig(
        vocab_size=len(SYMBOLS),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=344,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=256,
        # Lines are short: with the usual 10,000 most of a head's frequencies hardly move over one, and whether the
        # running sums are learned at all then hangs on the seed.
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
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
                scale = math.sqrt(2 * LAYERS) if writes else 1.0
                nn.init.normal_(module.weight, std=1 / math.sqrt(module.in_features) / scale)
    return model
