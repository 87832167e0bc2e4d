"""Optimizer steps of tiny thinking models, by name of a case: what one process does, and what every rank does."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

from quietstar.config.distributed import DistributedOptions
from quietstar.config.training import Replay, TrainConfig
from quietstar.data.batches import Batch
from quietstar.model.adapters import add_adapters
from quietstar.model.modeling import QuietStarForCausalLM
from quietstar.model.sharding import shard_model, whole
from quietstar.training.finetuning import set_gradient_checkpointing
from quietstar.training.ranks import ALONE, Ranks, join_ranks
from quietstar.training.step import OptimizerStep
from quietstar.training.step_functions import compute_step, evaluate_on

TEXTS, LENGTH, STEPS = 8, 14, 2


@dataclass
class Case:
    """How the model, the texts and the steps of a case differ from the first case."""

    dtype: torch.dtype = torch.float64
    tied: bool = False
    lora: int = 0
    padding: bool = False
    positions: str = "all"
    thinking: str = "sample"
    method: Literal["quietstar", "language_modeling"] = "quietstar"
    reuse: bool = True
    replay: Replay = "layers"
    micro: int | None = None
    micro_alone: int | None = None
    frozen: bool = False
    gathered: bool = False
    checkpointing: bool = False


CASES = {
    "plain": Case(),
    "tied": Case(tied=True),
    "padding": Case(padding=True),
    "padding, micro-batches": Case(padding=True, micro=2),
    "entropy": Case(positions="entropy:3", micro=2),
    "LoRA": Case(lora=3),
    "frozen": Case(frozen=True),
    "pause": Case(thinking="pause"),
    "language modelling": Case(method="language_modeling", padding=True),
    "language modelling, gradient checkpointing": Case(method="language_modeling", checkpointing=True),
    "two passes": Case(reuse=False),
    "replay": Case(replay="all"),
    "replay, gathered": Case(replay="linears", gathered=True),
    "uneven micro-batches": Case(micro=3, padding=True),
    "bfloat16": Case(dtype=torch.bfloat16, micro_alone=4),
    "bfloat16, LoRA": Case(dtype=torch.bfloat16, lora=3, micro_alone=4),
    "bfloat16, replay": Case(dtype=torch.bfloat16, replay="mlp", micro_alone=4),
}


def build(case: Case) -> QuietStarForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = MistralConfig(
            vocab_size=131,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            sliding_window=9,
            max_position_embeddings=64,
            tie_word_embeddings=case.tied,
        )
        base = MistralForCausalLM(config)
        with torch.no_grad():
            for weight in base.parameters():
                weight.mul_(4 if weight.ndim > 1 else 1)  # so that thoughts differ
        model = QuietStarForCausalLM.from_base(
            base, start_text=[3, 4], end_text=[5], thought_length=4, lookahead=3, thinking=case.thinking
        )
        if case.lora:
            add_adapters(model, case.lora, 2.0 * case.lora, "all-linear")
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    if "lora_B" in name:
                        weight.normal_(std=0.05)
        if case.frozen:
            for name, weight in model.named_parameters():
                weight.requires_grad_("layers.1." not in name and "embed_tokens" not in name)
        set_gradient_checkpointing(model, case.checkpointing)
        for weight in model.parameters():  # not the buffers: the rotary frequencies stay float32
            weight.data = weight.data.to(case.dtype)
    return model.train()


def texts(case: Case, step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(6, 131, (TEXTS, LENGTH), generator=generator)
    mask = torch.ones(TEXTS, LENGTH, dtype=torch.int64)
    for text in range(TEXTS):
        mask[text, LENGTH - (text * 5 + step) % 9 :] = 0
        if text % 3 == 0:  # two documents
            mask[text, 4:] *= 2
    return Batch(tokens, mask if case.padding else None, [f"text {text}" for text in range(TEXTS)])


def options(case: Case, alone: bool) -> TrainConfig:
    config = TrainConfig()
    config.model.positions = case.positions
    training = config.training
    training.method, training.reuse_sampling_pass, training.replay = case.method, case.reuse, case.replay
    training.batch_size, training.learning_rate, training.warmup_steps = TEXTS, 1e-3, 0
    training.micro_batch_size = case.micro_alone if alone and case.micro_alone else case.micro
    training.eval_batches = 2
    return config


def run(case: Case, ranks: Ranks) -> dict[str, Any]:
    """Returns the metrics of each step, the gradients of the first, the weights after all, and an evaluation."""
    model, config = build(case), options(case, ranks is ALONE)
    if ranks.mesh is not None:
        shard_model(model, ranks.model_mesh, keep_gathered=case.gathered)
    stepper = OptimizerStep(
        model, compute_step(config), config.training, torch.device("cpu"), lambda: False, print, ranks
    )
    found: dict[str, Any] = {"values": [], "gradients": {}}
    clip = stepper.optimizer.clip

    def keep(norms: Any) -> None:
        if not found["gradients"]:
            found["gradients"] = {
                name: joined(stepper.optimizer._trained[name].grad, parameter, ranks)
                for name, parameter in model.named_parameters()
                if parameter.requires_grad and stepper.optimizer._trained[name].grad is not None
            }
        clip(norms)

    stepper.optimizer.clip = keep  # type: ignore[method-assign]
    for step in range(1, STEPS + 1):
        found["values"].append(stepper.run(step, texts(case, step)))
    held_out = texts(case, 77)
    more = torch.cat([held_out.tokens, held_out.tokens[:5].flip(1)])  # a second batch that does not divide
    mask = (
        None if held_out.attention_mask is None else torch.cat([held_out.attention_mask, held_out.attention_mask[:5]])
    )
    model.eval()
    found["evaluation"] = evaluate_on(more, config, mask, ranks=ranks)(model)
    found["weights"] = {
        name: whole(parameter.detach()).clone().to(case.dtype) for name, parameter in model.named_parameters()
    }
    return found


def joined(part: Tensor, parameter: Tensor, ranks: Ranks) -> Tensor:
    """Returns a gradient of all ranks' shards; copies of the model have the same."""
    rows = ranks.gather(part)
    copies = rows.reshape(-1, *parameter.shape)
    assert all(torch.equal(copies[0], other) for other in copies)
    return copies[0].clone()


def main() -> None:
    """Runs all cases, or those named behind the number of ranks that a copy of the model is sharded over."""
    out, *rest = sys.argv[1:]
    torch.set_num_threads(1)
    with join_ranks(DistributedOptions(shard=int(rest[0]) if rest else None), "cpu") as ranks:
        for name in rest[1:] or CASES:
            found = run(CASES[name], ranks)
            if ranks.leads:
                torch.save(found, Path(out) / f"{list(CASES).index(name)}.pt")


if __name__ == "__main__":
    main()
