"""How well `python -m quietstar.plan` knows the memory of a training step.

    python benchmarks/plan_accuracy.py

For each of some small configurations the real `Trainer` does three steps on a CPU while PyTorch's profiler writes down
every block that its allocator gives out and takes back. Of the second step, from its first micro-batch to that of the
third: the bytes before it (weights and optimizer), the most bytes above those (activations and gradients), the most
bytes at all, and what lies between the first forward and backward pass, the activations that are kept. Beside them what
the plan says, in the same process, without having seen any of it.
"""

from __future__ import annotations

import gc
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only this file's folder is there

import torch
import transformers
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, MistralConfig, PreTrainedConfig

from benchmarks.environment import markdown_table
from benchmarks.script import Benchmark
from quietstar.config.training import DataOptions, FinetuningOptions, ModelOptions, Replay, TrainConfig, TrainingOptions
from quietstar.model.modeling import QuietStarForCausalLM
from quietstar.planning.trace import trace_model
from quietstar.training.finetuning import apply_finetuning
from quietstar.training.run import thinking_options
from quietstar.training.step_functions import compute_step
from quietstar.training.trainer import Trainer

QUANTITIES = {
    "standing": "weights and optimizer",
    "kept": "kept for the backward pass",
    "step": "peak above the standing",
    "total": "peak",
}
MICRO_BATCH, FORWARD_DONE = "a micro-batch begins", "a forward pass is done"
LIMIT = 0.1
MEBIBYTE = 2**20


@dataclass(frozen=True)
class Case:
    """One configuration."""

    name: str
    base: PreTrainedConfig
    model: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    finetuning: dict[str, Any] = field(default_factory=dict)
    length: int = 48

    @property
    def config(self) -> TrainConfig:
        """The options of the run."""
        return TrainConfig(
            preset="plain",
            model=replace(ModelOptions(path="in memory", thought_length=4, lookahead=3), **self.model),
            finetuning=FinetuningOptions(**self.finetuning),
            data=DataOptions(path="in memory", length=self.length),
            training=TrainingOptions(
                **{"batch_size": 2, "steps": 3, "eval_every": 0, "save_every": 0, "device": "cpu", **self.training}
            ),
        )


def mistral(**changes: Any) -> MistralConfig:
    """A small Mistral."""
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "vocab_size": 512}
    return MistralConfig(
        **{
            **sizes,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "sliding_window": None,
            "bos_token_id": None,
            "eos_token_id": None,
            **changes,
        }
    )


def cases() -> list[Case]:
    """All that are measured."""
    no_tokens = {"bos_token_id": None, "eos_token_id": None}
    llama = LlamaConfig(
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=1000,
        tie_word_embeddings=True,
        **no_tokens,
    )
    gpt2 = GPT2Config(n_embd=64, n_layer=3, n_head=4, vocab_size=600, n_positions=128, **no_tokens)
    gemma2 = Gemma2Config(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=700,
        sliding_window=16,
    )
    bf16 = {"dtype": "bfloat16"}
    language_modeling = {"method": "language_modeling"}
    two_passes = {"reuse_sampling_pass": False}
    return [
        Case("default", mistral()),
        Case("10 layers", mistral(num_hidden_layers=10)),
        Case("width 192", mistral(hidden_size=192, intermediate_size=512)),
        Case("vocabulary 8000", mistral(vocab_size=8000)),
        Case("L 128", mistral(), length=128),
        Case("S 17", mistral(), model={"thought_length": 12, "lookahead": 4}),
        Case("K 4", mistral(), model={"thoughts_per_position": 4}),
        Case("every:4", mistral(), model={"positions": "every:4"}, length=96),
        Case("entropy:0.25", mistral(), model={"positions": "entropy:0.25"}, length=96),
        Case("pause", mistral(), model={"thinking": "pause"}),
        Case("log_probs", mistral(), model={"interpolation": "log_probs"}),
        Case("two passes", mistral(), training=two_passes),
        Case("two passes, checkpointed", mistral(), training=two_passes, finetuning={"gradient_checkpointing": True}),
        *(Case(f"replay {stage}", mistral(), training={"replay": stage}) for stage in get_args(Replay)[1:]),
        Case("replay all, 10 layers", mistral(num_hidden_layers=10), training={"replay": "all"}),
        Case("4 micro-batches", mistral(), training={"batch_size": 4, "micro_batch_size": 1}),
        Case("bfloat16", mistral(), model=bf16),
        Case("bfloat16, 2 micro-batches", mistral(), model=bf16, training={"batch_size": 4, "micro_batch_size": 2}),
        Case("bfloat16, no masters", mistral(), model=bf16, training={"master_weights": False}),
        Case("LoRA", mistral(), finetuning={"lora_rank": 8}),
        Case("LoRA, replay all", mistral(), training={"replay": "all"}, finetuning={"lora_rank": 8}),
        Case("frozen embeddings", mistral(), finetuning={"freeze": "base.model.embed_tokens.*"}),
        Case("LM", mistral(), training=language_modeling, length=128),
        Case("LM, checkpointed", mistral(), training=language_modeling, finetuning={"gradient_checkpointing": True}),
        Case("window 16", mistral(sliding_window=16)),
        Case("Llama, tied", llama),
        Case("GPT-2", gpt2),
        Case("Gemma 2", gemma2),
        Case("Gemma 2, replay all", gemma2, training={"replay": "all"}),
    ]


def estimate(case: Case) -> dict[str, int]:
    """What the plan says, in bytes."""
    trace = trace_model(case.config, case.base, "cpu")
    standing, peak = trace.standing.total(), trace.peak.total()
    return {"standing": standing, "kept": trace.kept.total() - standing, "step": peak - standing, "total": peak}


def measure(case: Case) -> dict[str, int]:
    """What a run takes, in bytes."""
    config = case.config
    texts = torch.randint(0, case.base.vocab_size, (8, case.length), generator=torch.Generator().manual_seed(0))
    micro_batches_of_step = config.training.batch_size // (
        config.training.micro_batch_size or config.training.batch_size
    )

    def marked(model: QuietStarForCausalLM, batch: Any, seed: int) -> Any:
        with record_function(MICRO_BATCH):
            pass
        result = compute(model, batch, seed)
        with record_function(FORWARD_DONE):
            pass
        return result

    compute = compute_step(config)
    gc.collect()  # what earlier cases left must not be freed while this one is measured
    with (
        tempfile.TemporaryDirectory() as out,
        _quiet(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(case.base, dtype=getattr(torch, config.model.dtype))
        thinking = thinking_options(config.model) | {"start_text": [0], "end_text": [0]}
        model = apply_finetuning(QuietStarForCausalLM.from_base(base, **thinking), config.finetuning)
        Trainer(model, marked, texts, config.training, out, progress_label=None).run()
    assert profiler.profiler is not None
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    alive, begun, forwards = 0, 0, 0
    found = {"standing": 0, "kept": 0, "step": 0, "total": 0}
    for event in events:
        if event.name() == MICRO_BATCH:
            begun += 1
            if begun == micro_batches_of_step + 1:
                found["standing"] = found["total"] = alive
        elif event.name() == FORWARD_DONE:
            forwards += 1
            if forwards == micro_batches_of_step + 1:
                found["kept"] = alive - found["standing"]
        elif event.name() == "[memory]":
            alive += event.nbytes()
            if micro_batches_of_step < begun <= 2 * micro_batches_of_step:
                found["total"] = max(found["total"], alive)
    found["step"] = found["total"] - found["standing"]
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="training.master_weights")  # a case does without them
        yield


def compare(case: Case) -> dict[str, Any]:
    """One row of the table: bytes of both, and their ratio."""
    estimated, measured = estimate(case), measure(case)
    row: dict[str, Any] = {"case": case.name}
    for name in QUANTITIES:
        row |= {f"{name}_plan": estimated[name], f"{name}_run": measured[name]}
        row[f"{name}_ratio"] = round(estimated[name] / measured[name], 4)
    return row


def worst(row: dict[str, Any]) -> float:
    """The largest error of a row, relative to what was measured."""
    return max(abs(row[f"{name}_ratio"] - 1) for name in QUANTITIES)


def table(rows: Sequence[dict[str, Any]]) -> str:
    columns = ["configuration"]
    for meaning in QUANTITIES.values():
        columns += [f"{meaning}: plan", "run", "ratio"]
    cells = [
        [
            row["case"],
            *(
                cell
                for name in QUANTITIES
                for cell in (
                    f"{row[f'{name}_plan'] / MEBIBYTE:.3f}",
                    f"{row[f'{name}_run'] / MEBIBYTE:.3f}",
                    f"{row[f'{name}_ratio']:.3f}",
                )
            ),
        ]
        for row in rows
    ]
    return markdown_table(columns, cells)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Benchmark(__file__, __doc__)
    parser.add_threads()
    parser.add_argument("--only", default="", help="part of the names of the configurations to measure")
    parser.add_out("plan_accuracy")
    options = parser.begin(arguments)
    rows = []
    for case in cases():
        if options.only in case.name:
            rows.append(compare(case))
            print(f"{case.name:28} largest error {worst(rows[-1]):.2%}", flush=True)
    largest = max(map(worst, rows))
    body = (
        "Bytes of a training step, in MiB: what the plan says, what a run takes, and their ratio. The largest error of "
        f"{len(rows)} configurations is {largest:.1%}. What is measured is said at the top of "
        f"`benchmarks/plan_accuracy.py`.\n\n{table(rows)}"
    )
    parser.write(options.out, "Memory: plan and run", body, rows)
    return 0 if largest <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
