"""How a base model thinks: the options that a run and a saved model share.

Every option of a training run: one tree of dataclasses.

The same tree is the YAML file, the command line (`--training.learning_rate 1e-5`) and the saved `config.yaml`.
The `Args` of each docstring are its `--help`. Values are plain, so that what is printed can be read back exactly.

Options of the embedded default experiment, the textbook of sums.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from quietstar.config.objective import ObjectiveOptions, objective_of
from quietstar.config.options import (
    Count,
    Device,
    Finite,
    Natural,
    NonNegative,
    Positions,
    Positive,
    Share,
    ShareBelow1,
    Text,
    at_least,
    check,
)
from quietstar.config.presets import TRAIN_PRESETS
from quietstar.errors import ConfigError
from quietstar_kernels.backends import Backend


@dataclass
class ThinkingOptions:
    """How a base model thinks before each token (Quiet-STaR, arXiv 2403.09629, sections 4.1-4.4).

    Args:
        thought_length: Sampled tokens in one thought, START and END not counted.
        lookahead: True tokens after a thought that it is judged by (the paper's non-myopic loss, section 4.4).
        thoughts_per_position: Thoughts sampled at each position in training (K); their rewards are each other's
            baseline.
        interpolation: What the mixing weight w joins: `logits` (the released code: `softmax(w z_thought + (1-w)
            z_base)`) or `log_probs` (the paper's equation in section 4.3).
        mixing_activation: What turns the mixing head's output into w: `identity` leaves it unbounded as the released
            code does, `sigmoid` bounds it.
        initial_mixing_weight: Mixing weight of an untrained model. Null is the released code's head: no output bias and
            exactly 0 (a half with `sigmoid`). At 0 every reward and every gradient of START and END is exactly 0 too,
            so that learning starts only after the mixing head alone has moved; a small positive weight avoids that.
        embedding_scale: START and END are stored divided by this, which under AdamW multiplies their learning rate. The
            authors use 100; with 1 the trainer gives them a learning rate of their own instead.
        thinking: `sample` tokens for each thought, or `pause`: START in their place, tokens without content, as a
            control.
        temperature: Sampling temperature of the thoughts.
        backend: Which kernels to use; `auto` picks the fastest that the device has.
    """

    thought_length: Count = 8
    lookahead: Count = 4
    thoughts_per_position: Count = 2
    interpolation: Literal["logits", "log_probs"] = "logits"
    mixing_activation: Literal["identity", "sigmoid"] = "identity"
    initial_mixing_weight: Finite | None = 0.1
    embedding_scale: Positive = 1.0
    thinking: Literal["sample", "pause"] = "sample"
    temperature: Positive = 1.0
    backend: Backend = "auto"


def check_thinking(options: ThinkingOptions, prefix: str = "") -> None:
    """Refuses what no model can do.

    Args:
        options: Or an object with more fields, whose others are not looked at.
        prefix: What stands before a field's name in messages.

    Raises:
        ConfigError: naming the option, the value, and what is needed.
    """
    check(options, prefix, ThinkingOptions)
    weight = options.initial_mixing_weight
    if weight is not None and options.mixing_activation == "sigmoid" and not 0 < weight < 1:
        raise ConfigError(
            f"{prefix}initial_mixing_weight: got {weight}, but with {prefix}mixing_activation sigmoid it lies strictly "
            "between 0 and 1"
        )


INPUTS = ("model.path", "data.path")
LOGGERS = {"tensorboard": "TensorBoard", "wandb": "WeightsAndBiases"}
"""Experiment trackers: the class of each in `quietstar/training/loggers.py`, which needs torch."""
STREAMED_HOMES = {"openwebmath": "open-web-math/open-web-math", "c4": "allenai/c4"}
"""Hub datasets that a data source stands for."""


@dataclass
class BaseModelOptions:
    """The base model.

    Args:
        path: Directory or hub name of a Hugging Face causal language model. Only a hub name uses the network.
        dtype: Type of the parameters. The optimizer keeps float32 copies of bfloat16 ones.
    """

    path: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass
class ModelOptions(ThinkingOptions, BaseModelOptions):
    """The base model and how it thinks.

    Args:
        positions: Where to think; `every:N` is every N-th position, `entropy:K` the K positions of a text whose next
            token the base model is least sure of (K below 1 is a fraction of the text).
        start_text: Text whose embedding START begins as.
        end_text: Text whose embedding END begins as.
    """

    positions: Positions = "all"
    start_text: Text = "---"
    end_text: Text = "---"


@dataclass
class FinetuningOptions:
    """Which weights are trained; by default all of them. START, END and the mixing head always are.

    Args:
        lora_rank: Rank of low-rank adapters on the base model, whose own weights then stay as they are; 0: no adapters.
        lora_alpha: Adapters are scaled by lora_alpha / lora_rank; null: twice the rank.
        lora_targets: Names of the layers that get adapters, separated by commas, or `all-linear`.
        freeze: Patterns of parameter names that are not trained, separated by commas, such as
            `base.model.embed_tokens.*,base.model.layers.[0-9].*`.
        gradient_checkpointing: Recompute each layer in the backward pass also where no sampling pass has recorded it:
            with training.reuse_sampling_pass off, and in language modelling. Less memory, the same gradients.
    """

    lora_rank: Natural = 0
    lora_alpha: Positive | None = None
    lora_targets: str = "all-linear"
    freeze: str = ""
    gradient_checkpointing: bool = False


@dataclass
class DataOptions:
    """The text to learn from.

    Args:
        source: `files` reads text and JSONL files into memory. The others stream shards from a directory or a hub
            dataset: `openwebmath`, `c4`, or `stream` for any other. A shard holds JSON lines, plain or gzipped, or is
            parquet, which needs `pip install 'quietstar[data]'`.
        path: For `files` a text file (one document), a `.jsonl` file (one document per line), or a directory of both.
            For streams a directory or file; or a hub dataset, which a revision and a place in it may follow
            (`allenai/c4@main/en`). Null is the public home of `openwebmath` and `c4`.
        shards: Streams: pattern of the shards' names below path (`**/train*`); null: the usual one of the source.
        validation_path: Held-out text of the same kinds; of a stream it may end in a pattern, such as
            `allenai/c4/en/c4-validation*`. Without it the end of the training text (of a stream: its beginning) is held
            out.
        validation_fraction: Share of the texts held out, at least one, when there is no validation_path. Of a stream
            as many texts are held out as training.eval_batches asks for, unless this is 0.
        field: Field of a JSONL line, or column of a table, that holds the text.
        length: Tokens per training text.
        packing: How documents become texts: `joined` one after another, cut into texts of this length; `separate`, the
            same, but nothing in a text or thought sees another document; `crop`, the released code's: of each document
            a random piece of this length, shorter ones padded.
        append_eos: Put the tokenizer's end-of-sequence token after each document.
        shuffle_rows: Streams: rows are shuffled within windows of so many, which are held in memory, and shards among
            themselves; 1 keeps everything in order.
        workers: Threads that read and tokenise a stream ahead of the training; 0: none.
        on_bad_row: What a row that cannot be used (broken JSON, a missing field, not UTF-8, too long, no text) does:
            `stop` the run, or be `skip`ped with a message and counted.
        max_bad_rows: A run that has skipped more rows than this stops.
        max_row_bytes: Lines of JSON and texts of a table that are longer than this are bad rows.
    """

    source: Literal["files", "stream", "openwebmath", "c4"] = "files"
    path: str | None = None
    shards: str | None = None
    validation_path: str | None = None
    validation_fraction: ShareBelow1 = 0.05
    field: Text = "text"
    length: Annotated[int, at_least(2)] = 256
    packing: Literal["joined", "separate", "crop"] = "joined"
    append_eos: bool = True
    shuffle_rows: Count = 10_000
    workers: Natural = 1
    on_bad_row: Literal["stop", "skip"] = "stop"
    max_bad_rows: Natural = 100
    max_row_bytes: Count = 10_000_000


@dataclass
class TrainingOptions:
    """The training loop.

    Args:
        method: `quietstar`, or `language_modeling`: the plain next-token loss, as a control.
        steps: Optimizer steps. A run can be resumed with more of them; its schedule then follows the new number.
        batch_size: Texts per optimizer step.
        micro_batch_size: Texts per forward and backward pass, to save memory; divides batch_size. Null: all at once.
        learning_rate: Peak learning rate of the base model.
        warmup_steps: Steps over which the learning rate rises linearly from 0.
        schedule: Course of the learning rate after the warm-up.
        final_learning_rate_fraction: Where `linear` and `cosine` end, as a fraction of the peak.
        weight_decay: Decoupled weight decay of the matrices; norms, biases, START and END have none.
        adam_beta1: Decay of AdamW's mean of the gradient.
        adam_beta2: Decay of AdamW's mean of the squared gradient.
        adam_epsilon: Added to AdamW's denominator.
        optimizer: `adamw`, or `adamw_8bit`: its two moments in 8 bits, from bitsandbytes (`pip install
            'quietstar[8bit]'`).
        master_weights: Keep float32 copies of bfloat16 weights, which collect what is too small for bfloat16. Without
            them most weights do not move at a learning rate of 1e-6.
        max_grad_norm: The gradient of everything but START and END is scaled down to this norm.
        thought_embedding_lr_multiplier: Learning rate of START and END, in learning rates of the base model.
        thought_embedding_max_grad_norm: The gradient of START and END is scaled down to this norm of their own.
        mixing_head_lr_multiplier: Learning rate of the mixing head, in learning rates of the base model.
        reuse_sampling_pass: Let the pass that samples the thoughts be the forward pass of gradient checkpointing too:
            the same gradients with less work. Turn it off to have the plain two-pass step.
        eval_every: Evaluate on the held-out text after this many steps, and at the end; 0 never.
        eval_batches: Batches of held-out text per evaluation.
        save_every: Save a checkpoint after this many steps, and at the end; 0 only at the end.
        keep_checkpoints: How many of the newest checkpoints stay on disk.
        keep_best: Keep the checkpoint with the smallest evaluation loss too.
        on_save_failure: What a checkpoint that cannot be written (a full disk) does: `stop` the run or let it
            `continue`. Older checkpoints stay as they are.
        on_non_finite: What NaN or infinity in a loss, a gradient or a thought's log-probability does, before the
            weights change: `stop` the run, `skip` the step, or `rollback` to the newest checkpoint, which helps where
            the machine has erred: a step that fails again is skipped. The batch is written to `non_finite/`.
        max_non_finite: So many such steps one after another stop the run whatever the policy.
        on_out_of_memory: `halve` micro_batch_size and do the step again, or `stop`.
        log_every: Steps between two lines of metrics.
        log_to: Besides metrics.jsonl: `tensorboard`, `wandb`, or both with a comma (`pip install 'quietstar[log]'`).
        report: Write report.html at every evaluation and at the end.
        seed: Seed of the data order and of the thoughts.
        device: Device of the model.
        threads: CPU threads; null leaves PyTorch's choice.
        deterministic: Use only operations that give the same bits each time. On a CPU all of them do; on a GPU some
            are slower.
        resume: Continue from the newest checkpoint in output_dir where there is one. Turned off, a directory with
            checkpoints is refused; the embedded default deletes what it has written there and starts over.
        override: Resume although options, data or tokenizer have changed since; without it the differences are listed
            and the run is refused.
        allow_partial: Resume from a checkpoint that lacks everything but its weights, with a fresh optimizer.
    """

    method: Literal["quietstar", "language_modeling"] = "quietstar"
    steps: Count = 1000
    batch_size: Count = 8
    micro_batch_size: Count | None = None
    learning_rate: Positive = 1e-6
    warmup_steps: Natural = 20
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    final_learning_rate_fraction: Share = 0.1
    weight_decay: NonNegative = 0.001
    adam_beta1: ShareBelow1 = 0.9
    adam_beta2: ShareBelow1 = 0.999
    adam_epsilon: Positive = 1e-8
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    master_weights: bool = True
    max_grad_norm: Positive = 1.0
    thought_embedding_lr_multiplier: NonNegative = 100.0
    thought_embedding_max_grad_norm: Positive = 1.0
    mixing_head_lr_multiplier: NonNegative = 1.0
    reuse_sampling_pass: bool = True
    eval_every: Natural = 100
    eval_batches: Count = 8
    save_every: Natural = 500
    keep_checkpoints: Count = 2
    keep_best: bool = True
    on_save_failure: Literal["stop", "continue"] = "stop"
    on_non_finite: Literal["stop", "skip", "rollback"] = "stop"
    max_non_finite: Count = 5
    on_out_of_memory: Literal["halve", "stop"] = "halve"
    log_every: Count = 10
    log_to: str = ""
    report: bool = True
    seed: Natural = 0
    device: Device = "auto"
    threads: Count | None = None
    deterministic: bool = False
    resume: bool = True
    override: bool = False
    allow_partial: bool = False


@dataclass
class TextbookOptions:
    """Options of the embedded default, used with `preset: textbook` only.

    Args:
        seeds: Number of seeds to run, counted from training.seed; the table shows their mean and spread.
        operands: Numbers in a sum: one count such as `4`, or a range such as `3-5`.
        useful_asides: Share of the textbook's bracketed asides that work the sum out; the others only repeat it.
        pretraining_steps: Steps in which the character model reads the textbook, before any thinking.
        controls: Also train the controls: without REINFORCE, pause tokens, and plain language modelling.
    """

    seeds: Count = 1
    operands: str = "4"
    useful_asides: Share = 0.3
    pretraining_steps: Count = 1200
    controls: bool = True


@dataclass
class TrainConfig:
    """One training run.

    Args:
        preset: Name of the set of values that this run started from; see `quietstar/config/presets.py`.
        output_dir: Directory for everything that the run writes.
        model: The base model and how it thinks.
        finetuning: Which weights are trained.
        data: The text to learn from.
        objective: What is minimised.
        training: The training loop.
        textbook: The embedded default experiment.
    """

    preset: str = "textbook"
    output_dir: Text = "runs/quietstar"
    model: ModelOptions = field(default_factory=ModelOptions)
    finetuning: FinetuningOptions = field(default_factory=FinetuningOptions)
    data: DataOptions = field(default_factory=DataOptions)
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    textbook: TextbookOptions = field(default_factory=TextbookOptions)


def logger_names(log_to: str) -> list[str]:
    """The trackers that `training.log_to` asks for, in its order.

    Raises:
        ConfigError: One is not in `LOGGERS`.
    """
    names = list(dict.fromkeys(name.strip() for name in log_to.split(",") if name.strip()))
    if unknown := [name for name in names if name not in LOGGERS]:
        raise ConfigError(f"training.log_to: got {unknown[0]!r}, needs {' or '.join(LOGGERS)}, or both with a comma")
    return names


def validate(config: TrainConfig, required: Collection[str] = INPUTS) -> TrainConfig:
    """Checks every value that can be checked without reading a model or a text.

    Args:
        config: What to check.
        required: Which of `INPUTS` have to be named already.

    Returns:
        The same object, so that it can be used in an expression.

    Raises:
        ConfigError: naming the dotted key, the value, and what is needed.
    """
    _check_inputs(config, required)
    check(config)
    parse_operands(config.textbook.operands)
    check_training(config.training)
    _check_thinking(config)
    return config


def check_training(options: TrainingOptions) -> None:
    """Refuses options of the training loop that do not go together.

    Raises:
        ConfigError: naming the dotted key, the value, and what is needed.
    """
    check_micro_batch("training", options)
    logger_names(options.log_to)


def check_micro_batch(group: str, options: Any) -> None:
    """Refuses a micro-batch that does not divide the batch.

    Args:
        group: Of the options.
        options: With `batch_size` and `micro_batch_size`.

    Raises:
        ConfigError: It does not.
    """
    if options.micro_batch_size is not None and options.batch_size % options.micro_batch_size:
        raise ConfigError(
            f"{group}.micro_batch_size: got {options.micro_batch_size}, which does not divide {group}.batch_size "
            f"({options.batch_size})"
        )


def parse_operands(operands: str) -> range:
    """Read "4" or "3-5".

    Raises:
        ConfigError: Anything else, or fewer than two operands.
    """
    low, _, high = operands.partition("-")
    try:
        counts = range(int(low), int(high or low) + 1)
    except ValueError:
        counts = range(0)
    if not counts or counts[0] < 2 or counts[-1] > 8:
        raise ConfigError(
            f"textbook.operands: got {operands!r}, needs a count such as 4 or a range such as 3-5, from 2 to 8"
        )
    return counts


def run_options(config: TrainConfig) -> dict[str, Any]:
    """What a run trains and on what, by dotted key: it is another run if one of these changes.

    Without the options of the training loop, which the trainer compares itself, as it does the text; without where to
    read and write texts; and without `model.backend`, which changes speed alone.
    """
    names = ("model", "finetuning", "objective", "data")
    options = {name: asdict(getattr(config, name)) for name in names}
    dropped = {"model.backend", "data.path", "data.validation_path", "data.validation_fraction", "data.workers"}
    dropped |= {"data.on_bad_row", "data.max_bad_rows", "finetuning.gradient_checkpointing"}
    flat = {f"{group}.{name}": value for group, values in options.items() for name, value in values.items()}
    return {key: value for key, value in flat.items() if key not in dropped}


def _check_inputs(config: TrainConfig, required: Collection[str]) -> None:
    if config.preset not in TRAIN_PRESETS:
        raise ConfigError(f"preset: got {config.preset!r}, needs one of {', '.join(TRAIN_PRESETS)}")
    wanted = {"model.path": "a causal language model", "data.path": "a text to train on"}
    for key, path in zip(INPUTS, (config.model.path, config.data.path), strict=True):
        if config.preset == "textbook" and path is not None:
            raise ConfigError(
                f"{key}: got {path!r}, but preset textbook makes its own model and text; use preset plain for your own"
            )
        if path or key not in required:
            continue
        if key == "data.path" and config.data.source == "stream":
            raise ConfigError("data.path: missing; data.source stream needs a directory of shards or a hub dataset")
        has_home = key == "data.path" and config.data.source in STREAMED_HOMES
        if config.preset != "textbook" and not has_home:
            raise ConfigError(f"{key}: missing; preset {config.preset} needs {wanted[key]}")


def _check_thinking(config: TrainConfig) -> None:
    model = config.model
    check_thinking(model, "model.")
    if config.data.length < model.thought_length + model.lookahead:
        raise ConfigError(
            f"data.length: got {config.data.length}, needs at least model.thought_length + model.lookahead = "
            f"{model.thought_length} + {model.lookahead}"
        )
    objective = objective_of(config.objective)
    thinks = config.training.method == "quietstar" and model.thinking == "sample" and objective.policy_weight > 0
    if model.thoughts_per_position < 2 and thinks and objective.baseline == "leave_one_out":
        raise ConfigError(
            f"model.thoughts_per_position: got {model.thoughts_per_position}, needs at least 2 with "
            "objective.baseline leave_one_out (a thought's baseline is the mean of the others at its position); "
            "set objective.baseline to none, or objective.policy_weight to 0"
        )
