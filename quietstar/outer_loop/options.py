"""The options of STaR and V-STaR runs: one tree of dataclasses, as for training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from quietstar.tasks.options import ProblemOptions

__all__ = [
    "CharacterModelOptions",
    "EvaluationOptions",
    "GeneratorOptions",
    "LoopOptions",
    "ProblemOptions",
    "SamplingOptions",
    "VerifierOptions",
]


@dataclass
class GeneratorOptions:
    """The base model, which every fine-tuning starts from.

    Args:
        path: Directory or hub name of a Hugging Face causal language model. Only a hub name uses the network.
        dtype: Type of the parameters. The optimizer keeps float32 copies of bfloat16 ones.
        backend: Which kernels to use; `auto` picks the fastest that the device has.
    """

    path: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    backend: Literal["auto", "triton", "torch", "reference"] = "auto"


@dataclass
class CharacterModelOptions:
    """The small model over single characters that the embedded defaults make and start from.

    Args:
        layers: Of its decoder.
        hidden_size: Of its residual stream.
        context: Longest text in characters.
        steps: Optimizer steps on the task's human-written examples.
        batch_size: Rows per step.
        row_length: Tokens of a row, into which as many examples are put as fit.
        learning_rate: Peak learning rate.
    """

    layers: int = 3
    hidden_size: int = 128
    context: int = 256
    steps: int = 700
    batch_size: int = 4
    row_length: int = 192
    learning_rate: float = 2e-3


@dataclass
class SamplingOptions:
    """How completions are sampled.

    Args:
        engine: `transformers`, or `vllm` (`pip install 'quietstar[vllm]'`); `auto` takes vllm where it is installed and
            the device is a GPU.
        samples: Completions per problem and iteration.
        temperature: 0 is greedy.
        top_p: Sample from the smallest set of tokens that has this probability.
        top_k: Sample from so many of the likeliest tokens; 0: all.
        max_new_tokens: Tokens of a completion at most; those that need more end with finish reason `length`.
        batch_size: Completions at once; where memory runs out, transformers goes on with half as many.
        few_shot: Put the task's solved examples before each prompt.
    """

    engine: Literal["auto", "transformers", "vllm"] = "auto"
    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 256
    batch_size: int = 64
    few_shot: bool = True


@dataclass
class LoopOptions:
    """The outer loop.

    Args:
        iterations: How often to sample, filter and fine-tune; 0, with supervised_start: fine-tune on the human-written
            solutions and no more.
        rationalize: Retry each failure with the answer as a hint, and keep what comes back right without the hint.
        rationalization_fraction: Share of the failures that are retried.
        start_from: Fine-tune the `base` model anew in each iteration, as the papers do, or go on with the `previous`.
        accumulate: Train on what `all` iterations have kept, or on the `last` one's alone.
        demonstrations: Train on the task's human-written solutions too.
        supervised_start: Fine-tune the base on the human-written solutions before the first iteration, which then
            samples from that model (V-STaR's G_SFT).
        supervised_epochs: How long, in times through the solutions.
        supervised_steps: How long, in optimizer steps; null: `supervised_epochs`.
        supervised_learning_rate: Peak learning rate; null: that of the training.
        few_shot_in_training: Put the solved examples before the prompts that are trained on.
        deduplicate: Keep one of several completions of a problem that are `exact`ly the same, or the same `solution` by
            the task's own measure; `none` keeps all.
        max_per_problem: Completions kept of one problem at most; null: all.
        drop_hint_quotes: Leave out rationalised completions that speak of the hint.
        schedule: Fine-tuning steps of iteration i: `exponential`: int(start_steps * growth ** (i - 1)); `linear`:
            start_steps + added_steps * (i - 1); `epochs`: start_epochs + added_epochs * (i - 1) times through the data.
        start_steps: See schedule.
        growth: See schedule.
        added_steps: See schedule.
        start_epochs: See schedule.
        added_epochs: See schedule.
        row_length: Tokens of a row, into which as many examples are put as fit.
        keep_models: Keep the generators of `all` iterations on disk, or the `last` alone.
        redo: Do phases again whose inputs have changed, such as options of filtering or training, instead of refusing
            to go on; samples that still fit are used.
    """

    iterations: int = 5
    rationalize: bool = True
    rationalization_fraction: float = 1.0
    start_from: Literal["base", "previous"] = "base"
    accumulate: Literal["all", "last"] = "last"
    demonstrations: bool = False
    supervised_start: bool = False
    supervised_epochs: float = 2.0
    supervised_steps: int | None = None
    supervised_learning_rate: float | None = None
    few_shot_in_training: bool = False
    deduplicate: Literal["none", "exact", "solution"] = "exact"
    max_per_problem: int | None = None
    drop_hint_quotes: bool = True
    schedule: Literal["exponential", "linear", "epochs"] = "exponential"
    start_steps: int = 40
    growth: float = 1.2
    added_steps: int = 20
    start_epochs: float = 1.0
    added_epochs: float = 0.2
    row_length: int = 1024
    keep_models: Literal["all", "last"] = "all"
    redo: bool = False


@dataclass
class VerifierOptions:
    """What is trained to tell right completions from wrong ones.

    Args:
        beta: How far DPO may move from its reference (Eq. 2 of V-STaR; the paper does not say, 0.1 is usual).
        nll_weight: Weight of the NLL of the right completion (nats per token) beside the DPO loss; 0 is the paper's.
        pairs_per_problem: Pairs of a right and a wrong completion of one problem, drawn from all such pairs.
        score: What candidates are ranked by: `sum` of log-likelihoods (the paper's), their `mean`, or their log-`ratio`
            to the reference.
        steps: Optimizer steps; null: `epochs`.
        epochs: Times through the pairs.
        batch_size: Pairs per optimizer step.
        micro_batch_size: Pairs at once, to save memory; divides batch_size.
        learning_rate: Peak learning rate.
        warmup_steps: Steps over which it rises.
        baselines: Train an outcome reward model and a model on the right completions alone as well, to compare with.
        orm_learning_rate: Peak learning rate of the outcome reward model; null: `learning_rate`.
        orm_loss: Outcome reward model: `bce` or `mse` of every token of a completion.
    """

    beta: float = 0.1
    nll_weight: float = 0.0
    pairs_per_problem: int = 8
    score: Literal["sum", "mean", "ratio"] = "sum"
    steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 32
    micro_batch_size: int | None = None
    learning_rate: float = 5e-7
    warmup_steps: int = 20
    baselines: bool = False
    orm_learning_rate: float | None = None
    orm_loss: Literal["bce", "mse"] = "bce"


@dataclass
class EvaluationOptions:
    """What is measured on held-out problems.

    Args:
        candidates: Completions per held-out problem for pass@k, Best-of-k and majority votes, after the last iteration;
            0: greedy accuracy alone.
        temperature: That candidates are sampled at.
        ks: Values of k, with commas; those above `candidates` are left out.
        greedy: Greedy accuracy on the held-out problems after each iteration.
        resamples: Of the bootstrap over problems.
    """

    candidates: int = 0
    temperature: float = 0.7
    ks: str = "1,2,4,8,16,32,64"
    greedy: bool = True
    resamples: int = 1000
