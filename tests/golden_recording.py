"""Reads the recordings in tests/golden: one training step of the authors' released code on a tiny random model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import MistralConfig

from quietstar import QuietStarForCausalLM, load_authors_checkpoint

GOLDEN = Path(__file__).parent / "golden"
RECORDINGS = ("basic", "padded", "window")


@dataclass(frozen=True)
class Recording:
    settings: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def passes(self) -> int:
        return int(self.settings["passes"])

    @property
    def thought_length(self) -> int:
        return int(self.settings["n_ahead"]) - 3

    @property
    def lookahead(self) -> int:
        return int(self.settings["n_ahead_talk"])

    def weights(self) -> dict[str, Tensor]:
        return {k.removeprefix("weight."): v for k, v in self.tensors.items() if k.startswith("weight.")}

    def model(self, **options: Any) -> QuietStarForCausalLM:
        sizes = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "rope_theta",
            "rms_norm_eps",
            "sliding_window",
        )
        # Without pad_token_id: nn.Embedding gives its padding row no gradient, and the authors embed sampled tokens by
        # a product with the whole table, so their thoughts train that row.
        config = MistralConfig(**{name: self.settings[name] for name in sizes}, tie_word_embeddings=False)
        return load_authors_checkpoint(
            self.weights(),
            config,
            embedding_scale=self.settings["embedding_scale"],
            thought_length=self.thought_length,
            lookahead=self.lookahead,
            thoughts_per_position=self.passes,
            banned_token_ids=[self.settings["start_id"], self.settings["end_id"]],
            **options,
        )

    def to_streams(self, tensor: Tensor) -> Tensor:
        """[B*K, L, ...] as recorded to [B, L*K, ...], the thoughts of one position side by side."""
        grouped = tensor.unflatten(0, (-1, self.passes))
        return grouped.transpose(1, 2).flatten(1, 2)


def load_recording(name: str) -> Recording:
    settings = json.loads((GOLDEN / f"{name}.json").read_text())
    return Recording(settings, load_file(GOLDEN / f"{name}.safetensors"))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm().clamp_min(torch.finfo(expected.dtype).tiny))
