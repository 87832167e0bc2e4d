"""A character-level llama on disk, completions that are right where they end in `=`, and short options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from quietstar.config.loops import VerifierOptions
from quietstar.config.training import TrainingOptions
from quietstar.verifiers.pairs import Labelled

CHARACTERS = "0123456789+-= \nabcQA:"
END = "<end>"


def tokenizer(characters: str = CHARACTERS) -> PreTrainedTokenizerFast:
    """One token per character, and one that ends a text."""
    vocabulary = {character: index for index, character in enumerate(characters)} | {END: len(characters)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=END))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END)


def write_model(directory: Path, *, seed: int = 0, characters: str = CHARACTERS, context: int = 64) -> Path:
    """A model directory: 2 layers, hidden size 32."""
    own = tokenizer(characters)
    config = LlamaConfig(
        vocab_size=len(own),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=context,
        initializer_range=0.2,  # so that predictions depend on what is seen
        bos_token_id=None,
        eos_token_id=own.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(directory)
    own.save_pretrained(directory)
    return directory


def labelled(problems: int = 6) -> list[Labelled]:
    """Two right completions of each problem, which end in `=`, and three wrong ones, which end in `-`."""
    return [
        Labelled(
            f"p{number}", f"Q:{number}+{number}A:", f"{middle * (1 + number % 3)}{'=' if correct else '-'}", correct
        )
        for number in range(problems)
        for correct, middles in ((True, "ab"), (False, "ab0"))
        for middle in middles
    ]


def training(**changes: Any) -> TrainingOptions:
    """On one thread of the CPU, without anything on the disk but the end."""
    values: dict[str, Any] = {"save_every": 0, "log_every": 1, "device": "cpu", "threads": 1, "seed": 3}
    return TrainingOptions(**(values | changes))


def options(**changes: Any) -> VerifierOptions:
    """A few steps with a learning rate that shows."""
    values: dict[str, Any] = {"pairs_per_problem": 3, "steps": 4, "batch_size": 4, "learning_rate": 1e-2}
    return VerifierOptions(**(values | {"warmup_steps": 0} | changes))
