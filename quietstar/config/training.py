"""The options of a training run as one tree of dataclasses, and the checks of what must fit together.

The same tree is the YAML file, the command line (`--training.learning_rate 1e-5`) and the saved `config.yaml`. The
`Args` of each docstring are the lines of `--help`. Values are plain, so that what is printed can be read back exactly.
`TrainConfig` joins all groups; `validate` checks it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal, get_args

from quietstar.config.distributed import DistributedOptions, check_distributed
from quietstar.config.objective import ObjectiveOptions, objective_of
from quietstar.config.options import (
    INPUT,
    Count,
    Device,
    Natural,
    NonNegative,
    Positions,
    Positive,
    Seed,
    Share,
    ShareBelow1,
    SpecialTokensMean,
    Text,
    Threads,
    at_least,
    check,
    within,
)
from quietstar.config.presets import TRAIN_PRESETS
from quietstar.config.thinking import ThinkingOptions, check_thinking
from quietstar.errors import ConfigError

Replay = Literal["layers", "down", "mlp", "linears", "all"]
"""What the backward pass takes from the sampling pass; see `replay` of `TrainingOptions`."""
INPUTS = ("model.path", "data.path")
LOGGERS = ("tensorboard", "wandb")
"""Names of the experiment trackers; their classes are in `TRACKERS` of `quietstar/training/loggers.py`."""
STREAMED_HOMES = {"openwebmath": "open-web-math/open-web-math", "c4": "allenai/c4"}
"""Hub dataset that each data source stands for."""


@dataclass
class BaseModelOptions:
    """The base model.

    Args:
        path: Directory or hub name of a Hugging Face causal language model. Only a hub name uses the network.
        dtype: Type of the parameters. The optimizer keeps float32 copies of bfloat16 parameters.
    """

    path: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass
class ModelOptions(ThinkingOptions, BaseModelOptions):
    """The base model and how it thinks.

    Args:
        positions: Positions to think at: `all`; `every:N`, every N-th position; `entropy:K`, the K positions of a text
            whose next token the base model is least sure of (K below 1 is a fraction of the text).
        start_text: Text that gives START its initial embedding.
        end_text: Text that gives END its initial embedding.
    """

    positions: Positions = "all"
    start_text: Text = "---"
    end_text: Text = "---"


@dataclass
class FinetuningOptions:
    """The weights to train; by default all of them. START, END and the mixing head are always trained.

    Args:
        lora_rank: Rank of low-rank adapters on the base model, which keep its own weights unchanged; 0: no adapters.
        lora_alpha: Numerator of the adapters' scale, lora_alpha / lora_rank. Null: twice the rank.
        lora_targets: Names of the layers that get adapters, separated by commas, or `all-linear`.
        freeze: Patterns of the parameter names to leave untrained, separated by commas, such as
            `base.model.embed_tokens.*,base.model.layers.[0-9].*`.
        gradient_checkpointing: Whether the backward pass recomputes each layer also where no sampling pass has recorded
            it: with training.reuse_sampling_pass off, and in language modelling. Less memory, the same gradients.
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
        source: Kind of the training text: `files` reads files into memory. The others stream shards from a directory or
            a hub dataset: `openwebmath`, `c4`, or `stream` for any other.
        path: Place of the training text: a text (.txt, .md), which is one document; a file with a document in each row
            (.jsonl, .ndjson, .json, .csv, .tsv, or .parquet, which needs `pip install 'quietstar[data]'`), each also
            with .gz, .bz2, .xz, .zst; or a directory of them. For streams also a hub dataset, which a revision and a
            place in it may follow (`allenai/c4@main/en`). Null is the public home of `openwebmath` and `c4`.
        shards: Pattern of the files' names below path (`**/train*`). Null: the usual pattern of the source.
        validation_path: Place of held-out text, of the same kinds as path; for a stream it may end in a pattern, such
            as `allenai/c4/en/c4-validation*`. Null: the end of the training text is held out (of a stream: its
            beginning).
        validation_fraction: Share of the texts that is held out, at least one text, if there is no validation_path. A
            stream holds out as many texts as training.eval_batches needs, unless this is 0.
        field: Field of a row that holds the text, or a chat (`messages`), which the tokenizer's chat template makes a
            text of. `meta.text` is a field inside another one.
        special_tokens: Meaning of a special token's text in the data, such as `<|endoftext|>`: `parse`, this token; or
            `text`, its characters. How often there are any is told. A chat template's own are always tokens.
        length: Number of tokens per training text.
        packing: Way to make texts of documents: `joined`, one after another, cut into texts of this length; `separate`,
            the same, but no token or thought sees another document; `crop`, the released code's: a random piece of this
            length of each document, shorter ones padded.
        append_eos: Whether the tokenizer's end-of-sequence token follows each document.
        shuffle_rows: Streams: number of rows in the window, held in memory, within which rows are shuffled; shards are
            shuffled too. 1 keeps everything in order.
        workers: Number of threads that read and tokenise a stream ahead of the training; 0: none.
        on_bad_row: Reaction to a row that cannot be used (broken JSON, a missing field, not UTF-8, too long, no text):
            `stop` the run, or `skip` the row with a message and count it.
        max_bad_rows: Number of skipped rows above which the run stops.
        max_row_bytes: Largest row, in bytes; longer JSON lines and texts of a table are bad rows.
    """

    source: Literal["files", "stream", "openwebmath", "c4"] = "files"
    path: Annotated[str | None, INPUT] = None
    shards: str | None = None
    validation_path: Annotated[str | None, INPUT] = None
    validation_fraction: ShareBelow1 = 0.05
    field: Text = "text"
    special_tokens: SpecialTokensMean = "parse"
    length: Annotated[int, at_least(2)] = 256
    packing: Literal["joined", "separate", "crop"] = "joined"
    append_eos: bool = True
    shuffle_rows: Count = 10_000
    workers: Annotated[int, within(0, 1024)] = 1
    on_bad_row: Literal["stop", "skip"] = "stop"
    max_bad_rows: Natural = 100
    max_row_bytes: Count = 10_000_000


@dataclass
class TrainingOptions:
    """The training loop: steps, learning rate, evaluation, checkpoints, faults.

    Args:
        method: Training objective: `quietstar`, or `language_modeling`: the plain next-token loss, as a control.
        steps: Number of optimizer steps. A run can be resumed with more of them; the learning rate then follows the new
            number.
        batch_size: Texts per optimizer step.
        micro_batch_size: Texts per forward and backward pass, to save memory; divides batch_size. Null: all at once.
        learning_rate: Peak learning rate of the base model.
        warmup_steps: Steps over which the learning rate rises linearly from 0.
        schedule: Course of the learning rate after the warm-up. `linear` and `cosine` depend on steps: a run that is
            resumed with more of them is not the run that would have had so many from the beginning.
        final_learning_rate_fraction: Learning rate at the end of `linear` and `cosine`, as a fraction of the peak.
        weight_decay: Decoupled weight decay of the weight matrices; norms, biases, START and END have none.
        adam_beta1: Decay rate of AdamW's running mean of the gradient.
        adam_beta2: Decay rate of AdamW's running mean of the squared gradient.
        adam_epsilon: Number added to AdamW's denominator.
        optimizer: Optimizer: `adamw`, or `adamw_8bit`, which keeps both moments in 8 bits, from bitsandbytes (`pip
            install 'quietstar[8bit]'`).
        master_weights: Whether float32 copies of bfloat16 weights are kept, which collect updates that are too small
            for bfloat16. Without them most weights do not move at a learning rate of 1e-6.
        max_grad_norm: Largest norm of the gradient of all weights but START and END; a larger one is scaled down to it.
        thought_embedding_lr_multiplier: Learning rate of START and END, in multiples of `learning_rate`.
        thought_embedding_max_grad_norm: Largest norm of the gradient of START and END, clipped by themselves.
        mixing_head_lr_multiplier: Learning rate of the mixing head, in multiples of `learning_rate`.
        reuse_sampling_pass: Whether the pass that samples the thoughts is also the forward pass of gradient
            checkpointing: the same gradients with less work. Turned off, the step has two plain passes.
        replay: What the backward pass takes from the sampling pass, with reuse_sampling_pass. `layers`: nothing, each
            layer is recomputed from its input. `down`: products whose value no gradient depends on, such as a layer's
            last, are left out; refused where a norm is behind it, as in Gemma 2. `mlp`: also other products outside of
            attention, whose results are recorded. `linears`: also those of attention. `all`: also attention itself.
            `auto`: the last of these that fits into the memory, by the plan.
        fused_layers: Kernels of the base's norms, rotary embeddings and MLPs: `none`, PyTorch's operations one by one;
            `liger`, fused ones of Liger-Kernel (`pip install 'quietstar[gpu]'`), on a GPU, for layers like Llama's.
        eval_every: Steps between evaluations on the held-out text, with one more at the end; 0: no evaluation.
        eval_batches: Number of batches of held-out text per evaluation.
        save_every: Steps between checkpoints, with one more at the end; 0: only at the end.
        keep_checkpoints: Number of newest checkpoints that stay on disk.
        keep_best: Whether the checkpoint with the smallest evaluation loss stays on disk too.
        on_save_failure: Reaction to a checkpoint that cannot be written (a full disk): `stop` the run or let it
            `continue`. Older checkpoints stay unchanged.
        on_non_finite: Reaction to NaN or infinity in a loss, a gradient or a thought's log-probability, before the
            weights change: `stop` the run, `skip` the step, or `rollback` to the newest checkpoint, which helps after
            an error of the machine: a step that fails again is skipped. The batch is written to `non_finite/`.
        max_non_finite: Number of steps in a row with NaN or infinity that stops the run under every policy.
        on_out_of_memory: Reaction to running out of memory: `halve` micro_batch_size and repeat the step, or `stop` the
            run.
        log_every: Steps between two lines of metrics.
        log_to: Experiment trackers besides metrics.jsonl: `tensorboard`, `wandb`, or both with a comma (`pip install
            'quietstar[log]'`).
        report: Whether report.html is written at every evaluation and at the end.
        seed: Seed of the data order and of the thoughts.
        device: Device to train on: `auto` (the first GPU, or the CPU if there is none), `cpu`, `cuda` or `cuda:N`.
        threads: Number of CPU threads. Null: PyTorch's choice.
        deterministic: Whether only operations that give the same bits each time are used; on a GPU some are slower.
        resume: Whether the run continues from the newest checkpoint in output_dir, if there is one. Turned off, a
            directory with checkpoints is refused; the embedded default deletes what it has written there and starts
            again.
        override: Whether a run is resumed although options, data or tokenizer have changed; without it the differences
            are listed and the run is refused.
        allow_partial: Whether a run is resumed from a checkpoint that holds the weights only, with a fresh optimizer.
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
    replay: Literal[Replay, "auto"] = "layers"
    fused_layers: Literal["none", "liger"] = "none"
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
    seed: Seed = 0
    device: Device = "auto"
    threads: Threads | None = None
    deterministic: bool = False
    resume: bool = True
    override: bool = False
    allow_partial: bool = False


@dataclass
class TextbookOptions:
    """Options of the embedded default, which only `preset: textbook` uses.

    Args:
        seeds: Number of seeds to run, counted from training.seed; the table shows the mean and spread over them.
        operands: Count of numbers in a sum: one count such as `4`, or a range such as `3-5`.
        useful_asides: Share of the textbook's bracketed asides that work the sum out; the others only repeat the sum.
        pretraining_steps: Optimizer steps in which the character model reads the textbook, before any thinking.
        controls: Whether the controls are trained too: without REINFORCE, with pause tokens, and by plain language
            modelling.
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
        preset: Name of the preset that the run starts from; its values are in `quietstar/config/presets.py`.
        output_dir: Directory for all files that the run writes.
        model: Base model and how it thinks.
        finetuning: Weights to train: all, or low-rank adapters.
        data: Text to train on.
        objective: Training objective: a preset and overrides of single options.
        training: Options of the training loop.
        textbook: Options of the embedded default experiment.
        distributed: Options of a run on several devices, which torchrun starts.
    """

    preset: str = "textbook"
    output_dir: Text = "runs/quietstar"
    model: ModelOptions = field(default_factory=ModelOptions)
    finetuning: FinetuningOptions = field(default_factory=FinetuningOptions)
    data: DataOptions = field(default_factory=DataOptions)
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    textbook: TextbookOptions = field(default_factory=TextbookOptions)
    distributed: DistributedOptions = field(default_factory=DistributedOptions)


def logger_names(log_to: str) -> list[str]:
    """Returns the trackers that `training.log_to` asks for, in the given order.

    Raises:
        ConfigError: A name is not in `LOGGERS`.
    """
    names = list(dict.fromkeys(name.strip() for name in log_to.split(",") if name.strip()))
    if unknown := [name for name in names if name not in LOGGERS]:
        raise ConfigError(f"training.log_to: got {unknown[0]!r}, needs {' or '.join(LOGGERS)}, or both with a comma")
    return names


def validate(config: TrainConfig, required: Collection[str] = INPUTS) -> TrainConfig:
    """Checks every value that can be checked without reading a model or a text.

    Args:
        config: Configuration to check.
        required: Keys of `INPUTS` that have to be named already.

    Returns:
        The same object, so that it can be used in an expression.

    Raises:
        ConfigError: naming the dotted key, the value, and what is needed.
    """
    _check_inputs(config, required)
    check(config)
    parse_operands(config.textbook.operands)
    check_training(config.training)
    check_distributed(config.distributed, config.training, config.preset)
    _check_thinking(config)
    return config


def check_training(options: TrainingOptions) -> None:
    """Refuses options of the training loop that do not go together.

    Raises:
        ConfigError: naming the dotted key, the value, and what is needed.
    """
    check_micro_batch("training", options)
    if not options.reuse_sampling_pass and options.replay not in ("layers", "auto"):
        raise ConfigError(
            f"training.replay: got {options.replay}, but without training.reuse_sampling_pass nothing is recorded"
        )
    logger_names(options.log_to)


def replay_stage(options: TrainingOptions) -> Replay:
    """Returns the stage of `training.replay`.

    Raises:
        ConfigError: It is `auto`, which a plan has to replace first.
    """
    if options.replay == "auto":
        raise ConfigError(
            "training.replay: got auto, which only `python -m quietstar.train` and `plan` choose a stage for; needs "
            f"one of {', '.join(get_args(Replay))}"
        )
    return options.replay


def check_micro_batch(group: str, options: Any) -> None:
    """Refuses a micro-batch that does not divide the batch.

    Args:
        group: Name of the option group in the message, such as `training`.
        options: Object with the fields `batch_size` and `micro_batch_size`.

    Raises:
        ConfigError: The micro-batch does not divide the batch.
    """
    if options.micro_batch_size is not None and options.batch_size % options.micro_batch_size:
        raise ConfigError(
            f"{group}.micro_batch_size: got {options.micro_batch_size}, which does not divide {group}.batch_size "
            f"({options.batch_size})"
        )


def parse_operands(operands: str) -> range:
    """Reads a count such as "4" or a range such as "3-5".

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
    """Returns the options that decide what a run trains and on what, by dotted key: another value is another run.

    Left out are the options of the training loop and the text, which the trainer compares itself; where to read and
    write texts; and `model.backend`, which changes speed alone.
    """
    options = {name: asdict(getattr(config, name)) for name in ("model", "finetuning", "objective", "data")}
    dropped = {"model.backend", "data.path", "data.validation_path", "data.validation_fraction", "data.workers"}
    dropped |= {"data.on_bad_row", "data.max_bad_rows", "data.special_tokens", "finetuning.gradient_checkpointing"}
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
