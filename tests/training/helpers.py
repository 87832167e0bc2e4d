"""Small models and short options that the training tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from quietstar.config.training import TrainingOptions
from quietstar.data.batches import Batch
from quietstar.training.step import StepResult
from quietstar.training.trainer import Trainer

VOCABULARY = 64


def tiny_llama(dtype: torch.dtype = torch.float32, *, tied: bool = False, dropout: float = 0.0) -> LlamaForCausalLM:
    """2 layers, hidden size 32; the same weights every time."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        attention_dropout=dropout,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).to(dtype)


class ToyThinker(nn.Module):
    """Everything that `build_parameter_groups` tells apart."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.base = nn.Linear(4, 4)
            self.norm = nn.LayerNorm(4)
            self.thought_embedding = nn.Embedding(2, 4)
            self.mixing_head = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1, bias=False))

    def forward(self, hidden: Tensor) -> Tensor:
        thought = self.thought_embedding(torch.zeros(hidden.shape[0], dtype=torch.int64))
        return self.mixing_head(self.norm(self.base(hidden)) + thought)


def language_modeling_step(model: LlamaForCausalLM, batch: Batch, seed: int) -> StepResult:
    """The plain next-token loss."""
    tokens = batch.tokens
    logits = model(input_ids=tokens).logits[:, :-1].double()
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    accuracy = (logits.argmax(-1) == tokens[:, 1:]).double().mean()
    return StepResult(loss, {"accuracy": accuracy})


def texts(count: int = 24, length: int = 12) -> Tensor:
    """int64 [count, length] with something to learn: the next token is a function of this one."""
    first = torch.arange(count).unsqueeze(1) * 7
    return (first + 5 * torch.arange(length)) % VOCABULARY


def options(**changes: Any) -> TrainingOptions:
    """Short runs on the CPU with a learning rate that shows."""
    values: dict[str, Any] = {
        "method": "language_modeling",
        "steps": 6,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "eval_every": 0,
        "save_every": 0,
        "log_every": 1,
        "device": "cpu",
        "threads": 1,
    }
    return TrainingOptions(**(values | changes))


def trainer(
    output_dir: Path,
    model: nn.Module | None = None,
    compute_step: Callable[..., StepResult] = language_modeling_step,
    *,
    data: Tensor | None = None,
    options_: TrainingOptions | None = None,
    **arguments: Any,
) -> Trainer[Any]:
    """A silent trainer of the tiny llama, unless told otherwise."""
    return Trainer(
        tiny_llama() if model is None else model,
        compute_step,
        texts() if data is None else data,
        options_ or options(),
        output_dir,
        progress_label=None,
        **arguments,
    )


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
